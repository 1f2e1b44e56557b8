"""What can go wrong with a store or a registry: every message names the value, what is allowed, the remedy.

Each takes one message and nothing else, so that all of them survive pickle on their way between processes.
"""


class InfraError(Exception):
    """The root: one clear line for whoever runs the command."""


class SettingsError(InfraError):
    """An environment variable that cannot be used."""


class StoreError(InfraError):
    """The store could not do what was asked: disk full, bad URL, conditional writes ignored, ..."""


class StoreUnreachableError(StoreError):
    """Nothing answers at the store's address, or it stopped answering."""


class StoreAccessError(StoreError):
    """The store answered, and refused: wrong key, no permission, read-only directory."""


class BucketMissingError(StoreError):
    """The store answered: it has no bucket of this name."""


class ObjectMissingError(StoreError):
    """No object at this path."""


class ObjectExistsError(StoreError):
    """A create-only write found another object at its path."""


class ConflictError(StoreError):
    """A compare-and-swap found that the object had changed since it was read."""


class RegistryError(InfraError):
    """The registry refuses: unknown name, wrong facts, bundle that does not fit together, ..."""


class UnknownRecordError(RegistryError):
    """No such name, version or alias."""


class AliasMovedError(RegistryError):
    """Someone else moved the alias first."""


class IntegrityError(RegistryError):
    """Stored bytes are not those that were published: tampered with, truncated, or rotten."""


class SchemaError(RegistryError):
    """A manifest written by a newer version of this software."""


class UnsafeFileError(RegistryError):
    """A file that does not belong in a registry: pickled, or not what its name says."""


class ReadOnlyError(RegistryError):
    """The registry was opened for reading only, as the shipped one always is."""
