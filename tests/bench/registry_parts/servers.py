"""The S3 server and the fault proxy of the tests, for a benchmark: tests/helpers is not on its path."""

import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from infra.settings import Settings

HELPERS = Path(__file__).parents[2] / "helpers"


def load_helper(name: str) -> ModuleType:
    """A module of tests/helpers, once."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HELPERS / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # dataclasses look their own module up while it is made
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


@contextmanager
def s3_settings() -> Iterator[Settings]:
    """Settings for an empty bucket of a server that runs while the context is open."""
    with tempfile.TemporaryDirectory() as directory:
        folders = iter(range(100))

        def new_directory() -> Path:
            made = Path(directory) / f"weed-{next(folders)}"
            made.mkdir()
            return made

        server = load_helper("s3_servers").open_s3(new_directory)
        try:
            facts = server.facts
            yield Settings(
                store_url=f"s3://{facts.bucket}",
                s3_endpoint_url=facts.endpoint_url,
                s3_key=facts.key,
                s3_secret=facts.secret,
            )
        finally:
            server.close()
