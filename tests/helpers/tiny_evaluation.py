"""The settings of an evaluation of seconds, of the bundle that `rivals_store_url` holds."""

RUN = {
    "bundle": "rivals@1",
    "prompts": ["A red colored car.", "A blue colored cup."],
    "seeds": 2,
    "methods": ["mpa"],
    "pair_weights": [],
    "num_inference_steps": 2,
    "num_workers": 0,
    "resamples": 100,
}
