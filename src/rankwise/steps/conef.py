"""ConEF: error feedback for compressed gradients whose memory is itself compressed, in a count sketch.

    p = G + (1 - β) ẽ     D = Q(p)     step with D (its mean over the workers)     ẽ <- β ẽ + (p - D), kept as Sk, (m, w)

G is the (m, n) gradient of any matrix (a factor, a whole weight), Q a compressor whose results can be added up: a random block
of entries or PowerSGD's thin factors. Without feedback a biased compressor may never move some directions; with it every
gradient arrives in the end: Σ D = Σ G - ẽ where the memory is exact. A count sketch keeps w = ratio · n numbers per row instead
of n. β = 0 with an exact memory is classical error feedback. The first `start` steps and tensors of one dimension go
uncompressed. State: m w numbers, and n r for PowerSGD's Q.

Here, as a step, it compresses the gradient that it is given and saves nothing by itself: it shows what compression does to
training. `communication_hook` is the same arithmetic inside DistributedDataParallel, where every worker compresses its own
gradient before it is sent; use one or the other.

It is no adapter and exports nothing, and momentum belongs behind it.

*Differs*: hashes are computed from the seed as in the release, but the signs' hash is independent of the buckets'; where the
sketch is as wide as the row, each entry has its own bucket; PowerSGD's local error is taken from the worker's own part, not
from the mean; memory="means" (ours) never lengthens an error, so that it is safe at any width, best with smoothing=0. The
sketch is stable for sure while (largest bucket) · (1 − β) < 2, and may diverge beyond, which the loss shows.

Li, Zheng, Raman, Shrivastava, Giannakis: Contractive Error Feedback for Gradient Compression, 2023, arXiv:2312.08538.
"""

from __future__ import annotations

from rankwise.core.piece import register
from rankwise.core.sharding import sharded_like, whole
from rankwise.core.step import GRADIENT, Block, State, Step, site_name_of
from rankwise.steps.ddp_hook import communication_hook
from rankwise.steps.error_feedback import ErrorFeedback

__all__ = ["communication_hook", "conef"]


@register("step")
def conef(
    *,
    compressor: str = "block",
    share: float = 0.1,
    rank: int = 4,
    ratio: float = 0.2,
    smoothing: float = 0.9,
    memory: str = "sketch",
    start: int = 10,
    seed: int = 0,
) -> Step:
    """Compresses the gradient of every matrix and feeds the error back.

    Args:
        compressor: "block", "powersgd", "top" or "none".
        share: of the entries that "block" and "top" send.
        rank: of "powersgd".
        ratio: width of the sketch over the columns.
        smoothing: β.
        memory: "sketch", "exact" or "means".
        start: steps before anything is compressed.
        seed: of blocks, hashes and PowerSGD's first Q.

    Raises:
        ArgumentError: a number out of range.

    Example:
        >>> rankwise.compose("full + conef(compressor='powersgd', rank=2) + sgd(momentum=0.9)")
    """
    feedback = ErrorFeedback(
        compressor=compressor,
        share=share,
        rank=rank,
        ratio=ratio,
        smoothing=smoothing,
        memory=memory,
        start=start,
        seed=seed,
    )

    def key_of(block: Block, role: str) -> str:
        return f"{site_name_of(block)}.{role}"

    def init(block: Block) -> State:
        return {role: feedback.init(tensor, key_of(block, role)) for role, tensor in block.items()}

    def update(gradients: Block, state: State, parameters: Block) -> Block:
        changed = dict(gradients)
        for role, gradient in gradients.items():
            if gradient.dim() > 1:  # a sharded gradient is compressed whole, the same on every process
                mean = feedback.alone(whole(gradient), state[role], key_of(parameters, role))
                changed[role] = sharded_like(mean, gradient)
        return changed

    return Step(init, update, "conef", GRADIENT)
