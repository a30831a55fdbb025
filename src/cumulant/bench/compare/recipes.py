"""What `cumulant compare` trains: mechanisms under one budget.

A mechanism of several recipes is defined once, and a recipe may change its fields. A new mechanism
is an entry in the recipe that compares it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..reports import palette
from ..reports.palette import Style

QUICK_STEPS = 40


@dataclass(frozen=True)
class Mechanism:
    """A preset, and the fields of its configuration that differ.

    The width of its feed-forward is fitted to the budget. style: in pictures; None: a style that
    no other mechanism of the picture has.
    """

    name: str
    preset: str
    fields: dict[str, Any] = field(default_factory=dict)
    style: Style | None = None

    def with_fields(self, **fields: Any) -> Mechanism:
        return replace(self, fields={**self.fields, **fields})

    def variant(self, name: str, style: Style, **fields: Any) -> Mechanism:
        return replace(self.with_fields(**fields), name=f"{self.name}, {name}", style=style)


@dataclass(frozen=True)
class Comparison:
    """Mechanisms trained under one budget: same tokens, order, optimizer, width and size.

    Each keeps its preset's short convolutions, norms and feed-forwards: see `differences`.

    mechanisms: those that are compared.
    learning_rates: each mechanism is trained with all of them from the first seed, and with its
        best one from the other seeds.
    sweep: the share of the steps in which the rates are compared. Below 1 these trainings are
        shorter ones by themselves, with a whole schedule each, and the best rate is then trained
        from all seeds.
    width, depth, heads: of every model.
    parameters: of every model, within 2%.
    context, batch, accumulate: a step takes `batch` x `accumulate` windows of `context` tokens.
    steps: 0: as many as make `epochs` passes over the text.
    vocabulary: tokens of a byte-level BPE trained on the text; 0: bytes.
    data: the text if none is named; None: Python's standard library.
    heldout: the share of the text that is held out.
    evaluations: points of the curve.
    reach: the trained models are also tested at this multiple of `context`; on copies at four
        times of it at most.
    passing_steps, passing_rate: steps that trained models then take with states passed on
        (``--carry-state passing``), with this share of their learning rate; 0: none. Models whose
        states grow take none.
    baseline: the mechanism that the others are compared with.
    shared: fields of all models.
    training: fields of `TrainingOptions`.
    """

    mechanisms: tuple[Mechanism, ...]
    learning_rates: tuple[float, ...]
    width: int
    depth: int
    heads: int
    parameters: int
    context: int
    batch: int
    accumulate: int = 1
    steps: int = 0
    epochs: float = 1.0
    seeds: int = 3
    sweep: float = 1.0
    vocabulary: int = 0
    data: str | None = None
    heldout: float = 0.02
    evaluations: int = 8
    reach: int = 4
    passing_steps: int = 0
    passing_rate: float = 0.1
    baseline: str = "softmax"
    shared: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.learning_rates and all(0 < rate < math.inf for rate in self.learning_rates)):
            raise ValueError(
                f"learning_rate: expected numbers above 0, got {list(self.learning_rates)}"
            )
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise ValueError(f"learning_rate: each once, got {list(self.learning_rates)}")
        styles = [m.style for m in self.mechanisms if m.style is not None]
        if len(set(styles)) < len(styles):
            raise ValueError(
                f"style: two of {', '.join(m.name for m in self.mechanisms)} share one"
            )
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")
        if self.steps < 0:
            raise ValueError(
                f"steps: expected at least 1, or 0 for as many as the epochs take, got {self.steps}"
            )
        if not 0 < self.epochs < math.inf:
            raise ValueError(f"epochs: expected a number above 0, got {self.epochs}")
        if not 0 < self.sweep <= 1:
            raise ValueError(f"sweep: expected a share above 0, at most 1, got {self.sweep}")

    @property
    def step_tokens(self) -> int:
        return self.context * self.batch * self.accumulate

    def settings(self) -> dict[str, Any]:
        """The settings that a folder keeps: everything except the styles.

        Folders of earlier versions have no `sweep` and no states passed on, and go on without.
        """
        found = asdict(self)
        if self.sweep == 1:
            del found["sweep"]
        if self.passing_steps == 0:
            del found["passing_steps"], found["passing_rate"]
        for mechanism in found["mechanisms"]:
            del mechanism["style"]
        return found

    def chosen(self, names: list[str]) -> Comparison:
        """The comparison of the named mechanisms and the baseline alone."""
        known = [m.name for m in self.mechanisms]
        for name in names:
            if name not in known:
                raise ValueError(f"mechanism: expected one of {', '.join(known)}, got {name!r}")
        kept = tuple(m for m in self.mechanisms if not names or m.name in (*names, self.baseline))
        return replace(self, mechanisms=kept)

    def quick(self) -> Comparison:
        """A trial run of a few steps on a fourth of the tokens, too short to compare mechanisms."""
        return replace(
            self,
            context=max(self.context // 4, 1),
            accumulate=1,
            steps=QUICK_STEPS,
            seeds=2,
            evaluations=2,
            reach=min(self.reach, 4),
            passing_steps=min(self.passing_steps, QUICK_STEPS),
        )


SOFTMAX = Mechanism("softmax", "softmax", style=palette.BLACK)
TAYLOR = Mechanism("taylor", "taylor", style=palette.BLUE)
LINEAR = Mechanism("linear", "linear", style=palette.ORANGE)
BASED = Mechanism("based", "based", style=palette.VERMILION)
GATED = (
    Mechanism("gated_linear", "gated_linear", style=palette.ORANGE.variant(2)),
    Mechanism("gated_taylor", "gated_taylor", style=palette.BLUE.variant(2)),
    Mechanism("gated_based", "gated_based", style=palette.VERMILION.variant(2)),
)
# tokens that heads remember at first
SPREAD, SHORT, WIDE = (16, 160, 1600, 16000), (2, 8, 32, 128), (2, 16, 128, 1024)
# where gates start from; the first is the preset `gated_taylor`
STARTS = (
    GATED[1].variant("from 0.999", palette.NAVY, decay="gated"),
    GATED[1].variant("short", palette.BROWN, decay="gated", decay_spans=SHORT),
    GATED[1].variant("wide", palette.SKY.variant(), decay="gated", decay_spans=WIDE),
    GATED[1].variant("mamba2", palette.PINK, decay="mamba2"),
)
WINDOW = Mechanism("window-64", "softmax", {"mixers": ["sliding_window"]}, palette.SLATE)
FLASH = Mechanism("flash", "flash", style=palette.GREEN)
ELITA = Mechanism("elita", "elita", style=palette.PINK)


def flash_on_enwik8(
    group_size: int, layers: int, *, training: dict[str, Any] | None = None, **settings: Any
) -> Comparison:
    """FLASH and other mechanisms on the bytes of enwik8, as FLASH-pytorch's train.py trains it.

    As there, two FLASH layers stand against one layer of attention and feed-forward. FLASH's paper
    claims to equal a transformer with rotary positions and SwiGLU at 512 to 8192 tokens.
    """
    flash = FLASH.with_fields(
        gated_activation="laplace", group_size=group_size, num_hidden_layers=layers
    )
    return Comparison(
        mechanisms=(SOFTMAX, flash, TAYLOR, LINEAR),
        data="enwik8",
        shared={"tie_word_embeddings": False, "logits_bias": True},
        training={"weight_decay": 0.0, "clip": 0.5, **(training or {})},
        **settings,
    )


def twenty_million_tokens(context: int, batch: int) -> Comparison:
    """20M tokens of training, enough to show where mechanisms end, and how far their contexts go.

    They are 5.5 passes over Python's standard library. Trained models of these mechanisms are read
    up to 64 times their training length.
    """
    return Comparison(
        mechanisms=(SOFTMAX, LINEAR, TAYLOR, BASED, WINDOW, GATED[0], *STARTS, GATED[2]),
        learning_rates=(1e-3, 2e-3, 4e-3, 8e-3),
        width=128,
        depth=3,
        heads=4,
        parameters=1_050_000,
        context=context,
        batch=batch,
        steps=20_000_000 // (context * batch) + 1,
        seeds=2,
        sweep=0.1,
        vocabulary=2048,
        heldout=0.05,  # 202,000 tokens, for windows of 131,072
        evaluations=12,
        reach=64,
        passing_steps=500,
    )


RECIPES = {
    # A context that softmax can still afford. Two cores train it in three quarters of an hour.
    "long-context": Comparison(
        mechanisms=(
            SOFTMAX,
            TAYLOR,
            LINEAR,
            Mechanism("taylor, no convolution", "taylor", {"conv_size": 0}, palette.BLUE.variant()),
            BASED,
            FLASH.with_fields(num_hidden_layers=6),
            WINDOW,
        ),
        learning_rates=(1e-3, 2e-3, 4e-3, 8e-3),
        width=128,
        depth=3,
        heads=4,
        parameters=830_000,
        context=1024,
        batch=4,
        steps=300,
        vocabulary=1024,
    ),
    # Twenty-two trainings of a quarter of an hour each on two free cores, and forty-four of a
    # tenth of it: about seven hours, and ten at twice the context.
    "20m-tokens": twenty_million_tokens(context=1024, batch=8),
    "20m-tokens-2048": twenty_million_tokens(context=2048, batch=4),
    # Which gates, and whether beside rotary positions: trained at 512 tokens, read at 64 times
    # that length at most. Twenty-two trainings of three minutes each on two free cores, as many of
    # the same length with states passed on, and thirty-three of a fourth of it.
    "gates": Comparison(
        mechanisms=(
            TAYLOR,
            Mechanism("taylor, no rotary", "taylor", {"rotary": False}, palette.BLUE.variant(1)),
            GATED[1],
            GATED[1].variant("no rotary", palette.SKY, rotary=False),
            GATED[1].variant("spread", palette.NAVY, decay_spans=SPREAD),
            GATED[1].variant("divisor 16", palette.VERMILION, decay_divisor=16),
            GATED[1].variant("fixed", palette.GREEN, decay="fixed"),
            GATED[1].variant("mamba2", palette.PINK, decay="mamba2"),
            GATED[1].variant(
                "mamba2, no rotary", palette.PINK.variant(), decay="mamba2", rotary=False
            ),
            GATED[1].variant("short", palette.BROWN, decay_spans=SHORT),
            GATED[1].variant(
                "short, no rotary", palette.BROWN.variant(), decay_spans=SHORT, rotary=False
            ),
        ),
        learning_rates=(2e-3, 4e-3, 8e-3),
        width=128,
        depth=3,
        heads=4,
        parameters=1_050_000,
        context=512,
        sweep=0.25,
        batch=16,
        steps=250,
        seeds=2,
        vocabulary=2048,
        heldout=0.05,
        reach=64,
        passing_steps=250,
        baseline="taylor",
    ),
    # FLASH-pytorch's sizes (as in `cumulant.text.recipes`): 8 layers of 512, sequences of 1024
    # bytes, 16 a step, 100,000 steps at 2e-4.
    "flash-enwik8": flash_on_enwik8(
        group_size=256,
        layers=8,
        learning_rates=(2e-4, 5e-4, 1e-3),
        width=512,
        depth=4,
        heads=8,
        parameters=13_400_000,
        context=1024,
        batch=4,
        accumulate=4,
        steps=100_000,
        evaluations=20,
        training={"warmup": 0.01},
    ),
    # The same at a size that two cores train in half an hour, on bytes of any text.
    "flash-enwik8-small": flash_on_enwik8(
        group_size=128,
        layers=6,
        learning_rates=(2e-3, 4e-3, 8e-3, 1.6e-2),
        width=128,
        depth=3,
        heads=4,
        parameters=763_000,
        context=512,
        batch=8,
        steps=350,
        heldout=0.01,
    ),
    # ELiTA's README, 2023: fewer than 300K parameters, against a transformer with rotary positions
    # and SwiGLU. It trains one epoch of WikiText in sequences of 256, 128 a step, by Adam with
    # betas 0.9 and 0.99 and a rate of min(1e-3, 1e-2 / sqrt(step)). It states no sizes, vocabulary,
    # initial weights or seeds, and not which WikiText: these are ours, as are three of the rates.
    "elita-wikitext": Comparison(
        mechanisms=(
            SOFTMAX,
            ELITA,
            Mechanism("elita without Q", "elita", {"query_logit": False}, palette.PINK.variant(1)),
            Mechanism("elita, 3 wraps", "elita", {"wraps": 3}, palette.PINK.variant(2)),
            TAYLOR,
            LINEAR,
        ),
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        width=64,
        depth=3,
        heads=4,
        parameters=275_000,
        context=256,
        batch=128,
        vocabulary=2048,
        data="hf:Salesforce/wikitext:wikitext-2-raw-v1",
        heldout=0.05,
        shared={"initializer_range": 0.08},
        training={"schedule": "capped_inverse_sqrt", "adam_beta2": 0.99, "weight_decay": 0.0},
    ),
}


STYLES = {
    m.name: m.style for recipe in RECIPES.values() for m in recipe.mechanisms if m.style is not None
}


def find_recipe(name: str) -> Comparison:
    """The recipe of that name."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
