"""Pre-trains the sprites base model: codec, then text encoder and UNet jointly, with checkpoints and resume.

eps-prediction with SD's scaled-linear schedule, min-SNR-5 weights (Hang et al. 2023), 10 % null captions, an
exponential moving average of the weights, and a learning rate that is constant and then falls linearly to zero.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from blend.sprites.captions import sample_things, write_caption
from blend.sprites.codec import LATENT_CHANNELS, build_codec, save_codec, train_codec
from blend.sprites.scene import SIZE, render_things
from blend.sprites.tokenizer import MAX_TOKENS, write_tokenizer

Progress = Callable[[str, int, int, float], None]  # stage, done, total, loss or dB
_TEXT_WIDTH = 64


@dataclass(frozen=True, slots=True)
class PretrainPlan:
    """What fixes the result of a pre-training run."""

    codec_steps: int = 1500
    decoder_steps: int = 3000
    scenes: int = 65_536
    steps: int = 4600
    decay_share: float = 0.3  # of the steps, at the end, over which the learning rate falls to zero
    batch: int = 64
    learning_rate: float = 1.2e-3
    ema_decay: float = 0.999
    pair_share: float = 0.5
    null_caption_share: float = 0.1
    seed: int = 0


def build_unet() -> UNet2DConditionModel:
    """A three-level UNet over 16 x 16 latents with cross-attention in the lower two."""
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=_TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(vocabulary: int, bos: int, eos: int) -> CLIPTextModel:
    """A two-layer, 64-wide CLIP text encoder."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, without sample clipping."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def prepare_codec(plan: PretrainPlan, work: Path, progress: Progress) -> AutoencoderTiny:
    """The trained autoencoder: read from `work` when it is there, else trained and written."""
    directory = work / "vae"
    if (directory / "config.json").exists():
        return AutoencoderTiny.from_pretrained(directory).eval()
    torch.manual_seed(plan.seed)  # only initial weights draw from the global generator
    codec = build_codec()
    psnr = train_codec(
        codec,
        steps=plan.codec_steps,
        seed=plan.seed,
        on_step=lambda step, loss: progress("codec", step + 1, plan.codec_steps, loss),
    )
    (work / "codec.json").write_text(json.dumps({"psnr_db": psnr, "steps": plan.codec_steps}))
    save_codec(codec, directory)
    return codec


def refine_decoder(plan: PretrainPlan, work: Path, codec: AutoencoderTiny, progress: Progress) -> AutoencoderTiny:
    """Train the decoder on while the latents stay: sharper pictures for the same denoiser."""
    directory = work / "vae_refined"
    if (directory / "config.json").exists():
        return AutoencoderTiny.from_pretrained(directory).eval()
    psnr = train_codec(
        codec,
        steps=plan.decoder_steps,
        seed=plan.seed + 1,
        decoder_only=True,
        on_step=lambda step, loss: progress("decoder", step + 1, plan.decoder_steps, loss),
    )
    (work / "decoder.json").write_text(json.dumps({"psnr_db": psnr, "steps": plan.decoder_steps}))
    save_codec(codec, directory)
    return codec


def prepare_scenes(plan: PretrainPlan, work: Path, codec: AutoencoderTiny, progress: Progress) -> tuple[Tensor, Tensor]:
    """Encoded training scenes as fp16 latents [N, C, 16, 16] and token ids [N, MAX_TOKENS]."""
    path = work / "scenes.npz"
    tokenizer = write_tokenizer(work / "tokenizer")
    if not path.exists():
        rng = random.Random(plan.seed)
        latents, captions = [], []
        for start in range(0, plan.scenes, 64):
            things = [sample_things(rng, pair_share=plan.pair_share) for _ in range(64)]
            pixels = torch.from_numpy(np.stack([render_things(thing, rng) for thing in things]))
            with torch.no_grad():
                encoded = codec.encode(pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)).latents
            latents.append(encoded.half().numpy())
            captions += [write_caption(thing) for thing in things]
            progress("scenes", start + 64, plan.scenes, float(encoded.std()))
        tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS).input_ids
        np.savez(path, latents=np.concatenate(latents), tokens=np.asarray(tokens, dtype=np.int64))
    stored = np.load(path)
    return torch.from_numpy(stored["latents"]), torch.from_numpy(stored["tokens"])


class Pretrainer:
    """Trains the UNet and the text encoder together; `state` holds all that a resumed run needs."""

    def __init__(self, plan: PretrainPlan, work: Path, latents: Tensor, tokens: Tensor) -> None:
        self.plan, self.work, self.latents, self.tokens = plan, work, latents, tokens
        tokenizer = write_tokenizer(work / "tokenizer")
        torch.manual_seed(plan.seed)
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.null_tokens = torch.tensor(tokenizer("", padding="max_length", max_length=MAX_TOKENS).input_ids)
        self.parameters = [*self.unet.parameters(), *self.text_encoder.parameters()]
        self.ema = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=plan.learning_rate, weight_decay=0.01)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.alphas_cumprod: Tensor = build_scheduler().alphas_cumprod
        self.step = 0
        self.losses: list[tuple[int, float]] = []

    def run(self, progress: Progress, *, checkpoint_every: int = 500) -> None:
        """Train from the last checkpoint to the plan's last step."""
        self._restore()
        running = 0.0
        while self.step < self.plan.steps:
            loss = self._train_step()
            running = loss if running == 0 else 0.98 * running + 0.02 * loss
            self.step += 1
            if self.step % 50 == 0 or self.step == self.plan.steps:
                self.losses.append((self.step, running))
            progress("denoiser", self.step, self.plan.steps, running)
            if self.step % checkpoint_every == 0 or self.step == self.plan.steps:
                self._checkpoint()

    def _train_step(self) -> float:
        plan = self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_factor(self.step, plan)
        chosen = torch.randint(len(self.latents), (plan.batch,), generator=self.generator)
        latents, tokens = self.latents[chosen].float(), self.tokens[chosen]
        dropped = torch.rand(plan.batch, generator=self.generator) < plan.null_caption_share
        tokens = torch.where(dropped[:, None], self.null_tokens, tokens)
        noise = torch.randn(latents.shape, generator=self.generator)
        timesteps = torch.randint(len(self.alphas_cumprod), (plan.batch,), generator=self.generator)
        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        noise_pred = self.unet(noisy, timesteps, self.text_encoder(tokens).last_hidden_state).sample
        snr = (alpha / (1 - alpha)).flatten()
        error = (noise_pred - noise).square().mean((1, 2, 3))
        loss = (error * snr.clamp(max=5) / snr).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(plan.ema_decay, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [parameter.detach() for parameter in self.parameters], 1 - decay)
        return float(error.detach().mean())

    def _checkpoint(self) -> None:
        state = {
            "plan": asdict(self.plan),
            "step": self.step,
            "unet": self.unet.state_dict(),
            "text_encoder": self.text_encoder.state_dict(),
            "ema": self.ema,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "losses": self.losses,
        }
        partial = self.work / "denoiser.pt.partial"
        torch.save(state, partial)
        partial.replace(self.work / "denoiser.pt")

    def _restore(self) -> None:
        path = self.work / "denoiser.pt"
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        self.step, self.losses = state["step"], [tuple(point) for point in state["losses"]]
        self.unet.load_state_dict(state["unet"])
        self.text_encoder.load_state_dict(state["text_encoder"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.ema = state["ema"]

    def use_average(self) -> None:
        """Put the averaged weights into the modules, for export; training does not go on after this."""
        with torch.no_grad():
            for parameter, average in zip(self.parameters, self.ema, strict=True):
                parameter.copy_(average)


def learning_rate_factor(step: int, plan: PretrainPlan) -> float:
    """Warm-up over 500 steps, then 1, then a linear fall to 0 over the last `decay_share` of the steps."""
    decay_steps = max(1, round(plan.decay_share * plan.steps))
    return min(1.0, (step + 1) / 500, (plan.steps - step) / decay_steps)
