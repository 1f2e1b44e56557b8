"""Requests of every kind the endpoint serves, the clients that send them, and what came back."""

import asyncio
import base64
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from blend.preference import METHODS
from blend.sprites.captions import held_out_prompts
from workers.model_card import ModelCard

ROUTE = "/v1/images/generations"
PROMPTS = held_out_prompts(16)
NO_ANSWER = 0
HUNG_UP = 499
# what an error event would have been, had the answer not begun by then
STATUS_OF_EVENT = {"server_error": 500, "unavailable_error": 503, "timeout_error": 408, "rate_limit_error": 429}
TIMEOUT = httpx.Timeout(180.0)


@dataclass(frozen=True, slots=True)
class Mix:
    """Request number `index`: everything about it follows from the seed and the number."""

    card: ModelCard
    seed: str
    steps: tuple[int, int] = (4, 20)
    streamed: float = 0.25  # share of the requests
    images: tuple[int, ...] = (1, 1, 2)

    def request(self, index: int) -> dict[str, Any]:
        draws = random.Random(f"{self.seed}-{index}")
        basis = [adapter.name for adapter in self.card.basis]
        names = draws.sample(basis, draws.randint(1, min(3, len(basis))))
        parts = {name: 0.1 + draws.random() for name in names}
        method = draws.choice(METHODS)
        fields: dict[str, Any] = {
            "prompt": draws.choice(PROMPTS),
            "weights": {name: part / sum(parts.values()) for name, part in parts.items()},
            "method": method,
            "kl_lambda": draws.choice((0.5, 1.0, 1.0 if method == "ls" else 1.4)),
            "guidance_scale": draws.choice((1.0, 3.0)),
            "num_inference_steps": draws.randint(*self.steps),
            "n": draws.choice(self.images),
            "seed": draws.randrange(2**32),
        }
        if draws.random() < self.streamed:
            fields |= {"stream": True, "partial_images": draws.randint(0, 2)}
        return fields

    def requests(self, count: int, start: int = 0) -> list[dict[str, Any]]:
        return [self.request(start + index) for index in range(count)]


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got. `status` of a stream that ended in an error is that of the error."""

    status: int
    seconds: float
    client: str = ""
    images: tuple[bytes, ...] = ()
    usage: dict[str, float] = field(default_factory=dict)
    retry_after: str | None = None
    message: str = ""

    @property
    def ok(self) -> bool:
        return self.status == 200


Ask = Callable[[dict[str, Any]], Awaitable[Answer]]


class Clients:
    """Clients of one endpoint, each with a name and a token; they share a pool of connections."""

    def __init__(self, http: httpx.AsyncClient, url: str, tokens: dict[str, str]) -> None:
        self._http = http
        self._route = url + ROUTE
        self._tokens = tokens
        self.names = tuple(tokens)

    def headers(self, name: str = "") -> dict[str, str]:
        token = self._tokens.get(name or next(iter(self._tokens), ""))
        return {"Authorization": f"Bearer {token}"} if token else {}

    async def ask(self, fields: dict[str, Any], name: str = "") -> Answer:
        """Send one request as client `name` (the first, if none is named) and read the answer to its end."""
        began = time.perf_counter()
        try:
            async with self._http.stream("POST", self._route, json=fields, headers=self.headers(name)) as reply:
                got = await _read(reply)
        except httpx.HTTPError as error:
            got = {"status": NO_ANSWER, "message": repr(error)}
        return Answer(seconds=time.perf_counter() - began, client=name, **got)

    async def hang_up(self, fields: dict[str, Any], after_s: float, name: str = "") -> Answer:
        """Send a request and close the connection `after_s` seconds later, unless it was answered by then."""
        try:
            async with asyncio.timeout(after_s):
                return await self.ask(fields, name)
        except TimeoutError:
            return Answer(HUNG_UP, after_s, client=name)


@asynccontextmanager
async def clients_of(url: str, tokens: dict[str, str]):
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=TIMEOUT, trust_env=False) as http:
        yield Clients(http, url, tokens)


async def _read(reply: httpx.Response) -> dict[str, Any]:
    if reply.headers.get("content-type", "").startswith("text/event-stream"):
        return await _read_events(reply)
    content = await reply.aread()
    try:
        body = json.loads(content)
    except ValueError:
        return {"status": reply.status_code, "message": content[:200].decode(errors="replace")}
    if reply.status_code != 200:
        message = str(body.get("error", {}).get("message", ""))
        return {"status": reply.status_code, "retry_after": reply.headers.get("retry-after"), "message": message}
    images = tuple(base64.b64decode(one["b64_json"]) for one in body["data"])
    return {"status": 200, "images": images, "usage": body["usage"]}


async def _read_events(reply: httpx.Response) -> dict[str, Any]:
    images, usage = [], {}
    async for line in reply.aiter_lines():
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if error := event.get("error"):
            return {"status": STATUS_OF_EVENT.get(error["type"], 400), "message": error["message"]}
        if event["type"] == "image_generation.completed":
            images.append(base64.b64decode(event["b64_json"]))
            usage = event["usage"]
    if not images:
        return {"status": NO_ANSWER, "message": "the stream ended without an image"}
    return {"status": 200, "images": tuple(images), "usage": usage}


async def closed_loop(
    ask: Ask, requests: Iterable[dict[str, Any]], concurrency: int, *, seconds: float = float("inf")
) -> list[Answer]:
    """`concurrency` clients that each send the next request once answered, to the last or for so many seconds."""
    left, answers = iter(requests), []
    until = time.perf_counter() + seconds

    async def client() -> None:
        while time.perf_counter() < until and (fields := next(left, None)) is not None:
            answers.append(await ask(fields))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return answers


async def open_loop(ask: Ask, requests: Iterable[dict[str, Any]], rate: float, seconds: float) -> list[Answer]:
    """Poisson arrivals at `rate` a second, sent whether or not the earlier ones were answered; all answers."""
    gaps = random.Random("arrivals")
    began = time.perf_counter()
    due, asking, answers = 0.0, set(), []
    for fields in requests:
        due += gaps.expovariate(rate)
        if due > seconds:
            break
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        task = asyncio.create_task(ask(fields))
        asking.add(task)
        task.add_done_callback(lambda done: (asking.discard(done), answers.append(done.result())))
    await asyncio.gather(*asking)
    return answers
