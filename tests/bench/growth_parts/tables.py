"""From the samples of an evaluation to what every method keeps, and costs, as rewards are added.

Only mixes of equal weights, at lambda 1, are understood. A figure of a number of rewards is the mean over its mixes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from blend.metrics import interval, resample_weights
from workers.evaluation.gaps import Bootstrap
from workers.evaluation.grid import ADAPTER, BASE
from workers.evaluation.shares import UNDEFINED, named

Array = NDArray[np.float64]
REFERENCE = "mpa"
# One adapter for each image, drawn by the weights: no mixing of models, and worked out from the adapters alone.
DRAWN = "drawn"
MEANS = ("rows", "binding_right", "diversity")


class Growth:
    """Means over prompts of every setting, in all worlds: the one that was measured, then the bootstrap's draws.

    gains [worlds, settings, adapters] are above the base, in its standard deviations, each in an adapter's own reward.
    """

    def __init__(
        self,
        samples: pd.DataFrame,
        rewards: Mapping[str, str],
        sds: Mapping[str, float],
        bootstrap: Bootstrap | None = None,
    ) -> None:
        """`samples` as workers/evaluation/README.md describes them; `rewards` adapter -> reward, `sds` by reward.

        Raises ValueError where base, an adapter alone or equal weights are missing.
        """
        self._bootstrap = bootstrap or Bootstrap()
        self.basis = tuple(rewards)
        settings = samples.drop_duplicates("cell").sort_values("cell", ignore_index=True)
        self._methods = settings["method"].tolist()
        self._mixes = [_active(row, self.basis) for row in settings.to_dict("records")]
        columns = [*dict.fromkeys(rewards.values()), *MEANS]
        self._worlds = dict(zip(columns, np.moveaxis(self._resampled(samples, columns), -1, 0), strict=True))
        scores = np.stack([self._worlds[reward] / sds[reward] for reward in rewards.values()], axis=-1)
        self.gains = scores - scores[:, [self._place(BASE, ())]]
        alone = [self._place(ADAPTER, (place,)) for place in range(len(self.basis))]
        self._alone = self.gains[:, alone]  # [worlds, adapters, rewards]
        self._own = self._clearly_positive(np.diagonal(self._alone, axis1=1, axis2=2))

    def table(self) -> pd.DataFrame:
        """One row per method and number of rewards: gain per reward, share of the adapters' own, difference, costs.

        `adapter` with one reward is where all methods begin; `drawn` has no costs of its own.
        """
        rows = [self._row(method, count, places) for (method, count), places in self._groups().items()]
        rows += [self._drawn_row(count, mixes) for count, mixes in self.mixes().items() if count > 1]
        order = [*dict.fromkeys(row["method"] for row in rows)]
        return pd.DataFrame(sorted(rows, key=lambda row: (order.index(row["method"]), row["rewards"])))

    def by_reward(self) -> pd.DataFrame:
        """One row per method, number of rewards and adapter: gain and share of its own, over the mixes it is in."""
        rows = []
        for (method, count), places in self._groups().items():
            for adapter, name in enumerate(self.basis):
                within = [place for place in places if adapter in self._mixes[place]]
                if not within:
                    continue
                gain = self.gains[:, within, adapter].mean(axis=1)
                spans = self._named("gain", gain) | self._named("kept", gain / self._own[:, adapter])
                rows.append({"method": method, "rewards": count, "adapter": name, **spans})
        return pd.DataFrame(rows)

    def effects(self) -> Array:
        """Gain of each adapter alone in each reward, [adapters, rewards]."""
        return self._alone[0]

    def mixes(self) -> dict[int, list[tuple[int, ...]]]:
        """The distinct mixes by number of rewards, as positions in the basis."""
        found: dict[int, list[tuple[int, ...]]] = {}
        for mix in sorted(set(self._mixes), key=lambda mix: (len(mix), mix)):
            found.setdefault(len(mix), []).append(mix)
        found.pop(0)
        return found

    def base(self) -> dict[str, float]:
        """What an image of the base costs and is worth."""
        place = self._place(BASE, ())
        return {name: float(self._worlds[name][0, place]) for name in MEANS}

    def _groups(self) -> dict[tuple[str, int], list[int]]:
        found: dict[tuple[str, int], list[int]] = {}
        for place, (method, mix) in enumerate(zip(self._methods, self._mixes, strict=True)):
            if mix:
                found.setdefault((method, len(mix)), []).append(place)
        return found

    def _row(self, method: str, count: int, places: Sequence[int]) -> dict[str, object]:
        base = self._place(BASE, ())
        per_reward = self._per_reward(places)
        row: dict[str, object] = {
            "method": method,
            "rewards": count,
            "mixes": len(places),
            **self._named("gain", per_reward),
            **self._named("kept", self._kept(places)),
        }
        if method not in (REFERENCE, ADAPTER):
            mpa = [self._place(REFERENCE, self._mixes[place]) for place in places]
            row |= self._named("difference", per_reward - self._per_reward(mpa))
        for name in MEANS:
            row |= self._named(name, self._worlds[name][:, places].mean(axis=1))
        rows = self._worlds["rows"]
        return row | self._named("rows_ratio", rows[:, places].mean(axis=1) / rows[:, base])

    def _drawn_row(self, count: int, mixes: Sequence[tuple[int, ...]]) -> dict[str, object]:
        gain, kept = [], []
        for mix in mixes:
            among = self._alone[:, mix][:, :, mix].mean(axis=1)  # [worlds, rewards of the mix]
            gain.append(among.mean(axis=1))
            kept.append((among / self._own[:, mix]).mean(axis=1))
        return {
            "method": DRAWN,
            "rewards": count,
            "mixes": len(mixes),
            **self._named("gain", np.mean(gain, axis=0)),
            **self._named("kept", np.mean(kept, axis=0)),
        }

    def _per_reward(self, places: Sequence[int]) -> Array:
        """Mean over these settings, and the rewards of each, of the gain [worlds]."""
        return np.mean([self.gains[:, place][:, self._mixes[place]].mean(axis=1) for place in places], axis=0)

    def _kept(self, places: Sequence[int]) -> Array:
        """The same of each reward's share of its own adapter's gain [worlds]."""
        shares = [
            (self.gains[:, place] / self._own)[:, mix].mean(axis=1) for place in places if (mix := self._mixes[place])
        ]
        return np.mean(shares, axis=0)

    def _clearly_positive(self, worlds: Array) -> Array:
        """NaN for the columns of which there can be no share."""
        lows = [interval(column[0], column[1:], self._bootstrap.confidence).low for column in worlds.T]
        return np.where(np.array(lows) > 0, worlds, np.nan)

    def _named(self, name: str, worlds: Array) -> dict[str, float]:
        defined = np.isfinite(worlds).all()
        return named(name, interval(worlds[0], worlds[1:], self._bootstrap.confidence) if defined else UNDEFINED)

    def _place(self, method: str, mix: tuple[int, ...]) -> int:
        for place, found in enumerate(zip(self._methods, self._mixes, strict=True)):
            if found == (method, mix):
                return place
        names = " + ".join(self.basis[one] for one in mix) or "no adapter"
        raise ValueError(f"the evaluation has no setting of {method} with {names}: it is needed for comparison")

    def _resampled(self, samples: pd.DataFrame, columns: Sequence[str]) -> Array:
        """Means over seeds and then prompts, [worlds, settings, columns]; the unit of resampling is the prompt."""
        means = samples.groupby(["cell", "prompt_index"])[list(columns)].mean().sort_index()
        prompts = samples["prompt_index"].nunique()
        values = means.to_numpy(dtype=np.float64).reshape(-1, prompts, len(columns))
        generator = np.random.default_rng(self._bootstrap.seed)
        draws = resample_weights(prompts, self._bootstrap.resamples, generator)
        weights = np.vstack([np.full(prompts, 1 / prompts), draws])
        return np.einsum("wp,spc->wsc", weights, values)


def _active(row: Mapping[str, object], basis: Sequence[str]) -> tuple[int, ...]:
    weights = np.array([row[f"w_{name}"] for name in basis], dtype=np.float64)
    mix = tuple(int(place) for place in np.flatnonzero(weights))
    if mix and (np.ptp(weights[list(mix)]) > 1e-5 or row["kl_lambda"] != 1):
        given = dict(zip(basis, weights.tolist(), strict=True))
        raise ValueError(f"{given} at lambda {row['kl_lambda']}: give mixes of equal weights at lambda 1")
    return mix
