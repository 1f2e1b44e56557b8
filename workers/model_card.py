"""What an endpoint says of the bundle it serves: names, ranges, defaults and limits. Entry of `GET /v1/models`."""

import json
from typing import Literal

from pydantic import BaseModel

MAX_IMAGES = 8
MAX_STEPS = 200
MAX_PROMPT_CHARS = 2_000


class BundleName(BaseModel):
    """The one bundle that made an answer. `version` is None for a base and adapters given by path."""

    name: str
    version: int | None
    digest: str


class BasisCard(BaseModel):
    """One basis adapter: the record and reward behind it, and the weights it is recommended for, if known."""

    name: str
    adapter: str | None = None
    reward: str | None = None
    weight_range: tuple[float, float] | None = None


class Defaults(BaseModel):
    """What a request that leaves a field out gets. `weights` None: the field must be sent."""

    weights: dict[str, float] | None
    kl_lambda: float = 1.0
    method: str = "mpa"
    num_inference_steps: int
    guidance_scale: float
    eta: float = 1.0
    size: str


class Limits(BaseModel):
    """What a request may ask for. Sizes are pixels of one side, a multiple of `size_multiple`."""

    size_multiple: int
    min_size: int
    max_size: int
    max_images: int = MAX_IMAGES
    max_steps: int = MAX_STEPS
    max_prompt_chars: int = MAX_PROMPT_CHARS
    max_prompt_tokens: int


class ModelCard(BaseModel):
    """One entry of `GET /v1/models`."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str = "diffusion-blend"
    accepted_names: list[str]
    bundle: BundleName
    basis: list[BasisCard]
    methods: list[str]
    kl_lambda_range: tuple[float, float]
    kl_lambda_recommended: tuple[float, float]
    defaults: Defaults
    limits: Limits

    def example_weights(self) -> dict[str, float]:
        """Weights that work here: the default, or all on the first basis adapter."""
        return self.defaults.weights or {self.basis[0].name: 1.0}

    def curl_example(self, url: str, *, with_token: bool = False) -> str:
        """A command to copy that asks the endpoint at `url` for one image."""
        token = ' -H "Authorization: Bearer $DIFFUSION_BLEND_TOKEN"' if with_token else ""
        body = json.dumps({"prompt": "A red colored car.", "weights": self.example_weights(), "seed": 7})
        return (
            f"curl -s {url}/v1/images/generations -H 'Content-Type: application/json'{token} \\\n"
            f"  -d '{body}' \\\n"
            "  | python3 -c 'import base64, json, sys; "
            'open("image.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\''
        )


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
