"""What is trained on two processes: a few parameterizations, and every step, perturbation and procedure of the catalog.

A method whose path differs between processes in some mode has that mode here as well. What is refused, and what is only equal
between the processes and not to one process with the whole batch, is named with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import rankwise as rw
from rankwise import catalog
from rankwise.core.recipe import Recipe


@dataclass(frozen=True)
class Kind:
    """One recipe under test.

    Attributes:
        name, text: of the recipe.
        generated: from the catalog; trained in float64, where only the method can make a difference.
        train_also: layers trained whole beside the adapter.
        wrapped_again: whether DDP is made anew when tensors were replaced.
    """

    name: str
    text: str
    generated: bool = True
    wrapped_again: bool = True
    train_also: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        return self.name.partition(" ")[0]

    def recipe(self) -> Recipe:
        """Without dropout: processes draw masks of their own."""
        made = rw.compose(self.text)
        if not made.parameterization.arguments.get("dropout"):
            return made
        piece = made.parameterization
        return replace(made, parameterization=replace(piece, arguments={**piece.arguments, "dropout": 0.0}))


PARAMETERIZATIONS = {
    "lora": "lora(rank=4) + sgd(momentum=0.9)",
    "lora_adamw": "lora(rank=4)",
    "dora": "dora(rank=3) + sgd(momentum=0.9)",
    "vera": "vera(rank=6) + sgd(momentum=0.9)",
    "tied_lora": "tied_lora(rank=4) + sgd(momentum=0.9)",
    "intrinsic_dimension": "intrinsic_dimension(dimension=20) + sgd(momentum=0.9)",
}
VARIANTS = (
    "scaled_gd(sequential=True)",
    "scaled_gd(normalized=True, damping=0.0)",
    "reflora(warmup=1, variant='scalar')",
    "lora_pro(variant='sgd')",
    "theory_gradient_clipping(max_norm=0.05, mode='per_role')",
    "theory_gradient_clipping(max_norm=0.05, mode='effective')",
    "theory_gradient_clipping(quantile=0.5)",
    "stiefel_adam(retraction='cayley')",
    "stiefel_adam(retraction='exponential')",
    "fira(rank=2, refresh=3, scaling='matrix')",
    "sam(rho=0.1, adaptive=True)",
    "bar(kind='obar')",
    "cola(rank=3, interval=2, ranks=(2, 1))",
    "autolora_robust(rank=2, attack_steps=2, update_every=2)",
    "conef(compressor='powersgd', start=1)",
    "zeroth_order(directions=2, smoothing=0.1, distribution='sphere')",
    "zo_rank(candidates=4, line_search=2)",
    "trp(interval=2, fraction=0.5, nuclear=0.01)",
)
# In the root's group, which FSDP2 keeps whole after a forward without backward.
WITH_HEAD = Kind(
    "zeroth_order on whole weights",
    "full + zeroth_order(directions=2, smoothing=0.1, distribution='sphere') + sgd(momentum=0.9)",
    train_also=("lm_head",),
)
NOT_WRAPPED_AGAIN = "cola not wrapped again"
# recipe -> why two processes do not give what one process with the whole batch gives; they agree with each other all the same
ONLY_BETWEEN_PROCESSES = {
    "lora_ggpo": "every process draws noise of its own",
    "autolora_robust": "every process draws the start of its attack, and weighs its share by its own accuracy",
}
# mode -> recipe -> (what the message says, why)
IN_PARTS = ("train it with DDP", "what is absorbed or made anew at once must not lie on several devices")
OWN_TENSORS = ("the bare model in every process", "every process has heads of its own, and a wrapper would make them one")
REFUSED = {
    "ddp": {
        "lte": OWN_TENSORS,
        NOT_WRAPPED_AGAIN: ("Wrap the model again", "DDP averages what it was given, not the narrower factors that follow"),
    },
    "fsdp": {
        **dict.fromkeys(("relora", "rac_lora", "cola", "sst", "dlrt", "tucker_dlrt", "cuttlefish", "maestro"), IN_PARTS),
        "lte": OWN_TENSORS,
    },
}


def _name(text: str) -> str:
    slug, _, arguments = text.partition("(")
    return f"{slug} {arguments[:-1]}".replace("'", "")


def _kinds() -> dict[str, Kind]:
    found = [Kind(name, text, generated=False) for name, text in PARAMETERIZATIONS.items()]
    slugs = [slug for shelf in ("step", "perturbation", "procedure") for slug in catalog.names(shelf)]
    found += [Kind(slug, catalog.entry(slug).small) for slug in slugs]
    found += [Kind(_name(text), text) for text in VARIANTS]
    found.append(WITH_HEAD)
    found.append(Kind(NOT_WRAPPED_AGAIN, "cola(rank=3, interval=2, ranks=(2, 1))", wrapped_again=False))
    return {kind.name: kind for kind in found}


KINDS = _kinds()


def expected_refusal(mode: str, kind: Kind) -> tuple[str, str] | None:
    """What the refusal says, and the reason, where one is due."""
    refused = REFUSED[mode]
    return refused.get(kind.name) or refused.get(kind.slug)
