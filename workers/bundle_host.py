"""Keeps one process serving the bundle that is wanted: another is loaded beside it, and takes over when it is whole.

Every request is answered by the service it began on, so each answer names exactly one bundle. A bundle that cannot be
loaded leaves the old one in place, with a warning. Knows no Ray; all of it runs on one event loop.
"""

import asyncio
import logging

from infra.errors import InfraError, UnknownRecordError
from workers.api import Health, Refusal
from workers.bundles import find_record
from workers.engine_args import EngineArgs, ServeArgs
from workers.loading import open_engine, pin, settings_of
from workers.metrics import Metrics
from workers.service import GenerationService

log = logging.getLogger(__name__)


class BundleHost:
    """`service` is the one to ask now. Call `start` first, off the event loop."""

    def __init__(self, args: ServeArgs, metrics: Metrics | None = None) -> None:
        self.warning: str | None = None
        self.service: GenerationService
        self._args = args
        self._metrics = metrics or Metrics()
        self._wanted: str | None = None
        self._settling: asyncio.Task[None] | None = None
        self._retiring: set[asyncio.Task[None]] = set()

    def start(self, bundle: str | None) -> None:
        """Load the first bundle (None: the base and adapters of the arguments). Raises what is wrong with it."""
        self._wanted = bundle
        self.service = self._open(self._args_for(bundle))
        self._announce()

    def want(self, bundle: str | None) -> None:
        """Serve this bundle as soon as it is loaded; the same one again only looks whether its alias has moved."""
        if bundle != self._wanted:
            self._wanted, self.warning = bundle, None
        if self._settling is None or self._settling.done():
            self._settling = asyncio.create_task(self._settle())

    async def settled(self) -> None:
        """Return when no change is under way."""
        if self._settling is not None:
            await self._settling

    async def follow(self) -> None:
        """Look every `follow_alias_s` seconds whether the alias has moved, for good."""
        while self._args.follow_alias_s:
            await asyncio.sleep(self._args.follow_alias_s)
            self.want(self._wanted)

    def resolve(self, bundle: str) -> str | Refusal:
        """The bundle with its version written out, fetched and checked; a Refusal says what is wrong with it."""
        if self._args.adapters:
            return Refusal(status=409, message="this endpoint serves a base with adapters by path, not a bundle")
        try:
            return str(pin(self._args_for(bundle)).bundle)
        except UnknownRecordError as error:
            return Refusal(status=404, message=str(error), type="not_found_error", param="bundle")
        except (InfraError, ValueError) as error:
            return Refusal(status=409, message=str(error), param="bundle")

    def standing(self, bundle: str, ref: str) -> Health | Refusal:
        """Whether `bundle` is served by now, in the version `ref`; a Refusal when it could not be loaded."""
        if self.service.opened.args.bundle == ref:
            return Health(status="ready", bundle=self.service.opened.card.bundle)
        if self._wanted == bundle and self.warning is not None:
            return Refusal(status=409, message=self.warning, param="bundle")
        return Health(status="loading", bundle=self.service.opened.card.bundle)

    async def readiness(self) -> Health | Refusal:
        health = await self.service.readiness()
        return health if isinstance(health, Refusal) else health.model_copy(update={"warning": self.warning})

    async def _settle(self) -> None:
        while True:
            wanted = self._wanted
            try:
                service = await asyncio.to_thread(self._open_other, wanted)
            except Exception as error:
                self.warning = f"{wanted} could not be loaded: {error}; {self.service.opened.card.id} keeps serving"
                log.warning("bundle_refused", extra={"facts": {"bundle": wanted, "reason": str(error)}})
            else:
                self.warning = None
                if service is not None:
                    old, self.service = self.service, service
                    self._announce()
                    retiring = asyncio.create_task(_retire(old))
                    self._retiring.add(retiring)
                    retiring.add_done_callback(self._retiring.discard)
            if self._wanted == wanted:
                return

    def _open_other(self, bundle: str | None) -> GenerationService | None:
        """The service of `bundle`; None when it is what is served already."""
        args, served = self._args_for(bundle), self.service.opened.args
        if args.bundle_ref is None:
            return None
        record = find_record(args.bundle_ref, settings_of(args))[1]
        if (record.ref, args.bundle_ref) == (served.bundle, served.asked_as):
            return None
        return self._open(args)

    def _open(self, args: EngineArgs) -> GenerationService:
        opened = open_engine(pin(args))
        service = GenerationService(opened, max_queue_s=self._args.max_queue_s, metrics=self._metrics)
        try:
            service.warm_up()
        except BaseException:
            service.close()
            raise
        return service

    def _announce(self) -> None:
        bundle = self.service.opened.card.bundle
        self._metrics.serving(**bundle.model_dump())
        log.info("serving", extra={"facts": bundle.model_dump()})

    def _args_for(self, bundle: str | None) -> EngineArgs:
        return self._args if bundle is None else self._args.model_copy(update={"bundle": bundle, "asked_as": None})


async def _retire(service: GenerationService) -> None:
    """End a service once its requests are answered."""
    while service.loop.in_flight:
        await asyncio.sleep(0.05)
    await asyncio.to_thread(service.close)
