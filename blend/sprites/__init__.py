"""The embedded sprites world: captions, art, scenes, and the model trained on them."""
