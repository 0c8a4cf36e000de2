"""Headings and reading aids of the report's plots, and its two standing paragraphs."""

CAPTIONS: dict[str, tuple[str, str]] = {
    "ranking": (
        "How good, and by how much",
        "Left: each pale point is one seed, the large one the mean, the bar its 95 % interval. Right: the difference from the "
        "best recipe, taken seed by seed on the same batches. A filled point is a resolved difference, an open one is not.",
    ),
    "curves": (
        "Training loss",
        "Mean over seeds of the running mean, with the band from the lowest to the highest seed.",
    ),
    "size": (
        "Quality against trained numbers",
        "Bars are 95 % intervals over seeds. Toward the left is smaller; recipes of the same size stand side by side.",
    ),
    "rates": (
        "How sensitive to the learning rate",
        "Loss on validation batches. Dotted: the short first runs; solid: the better half again for longer; the large point is "
        "the rate that was chosen. A cross marks a run that diverged or lies above the frame.",
    ),
    "costs": (
        "What it costs",
        "FLOPs and bytes are exact counts of one training step on one batch; seconds are medians on this machine and vary with "
        "its load.",
    ),
    "retention": (
        "Learned against forgotten",
        "Further right, more of the base's general ability was lost. Bars are 95 % intervals.",
    ),
    "spectra": (
        "What training did to each layer",
        "Singular values of the update, largest first, one row per layer (one seed); on the right the effective rank, that is "
        "how many directions share the update. Rows that stay bright use their rank; rows that fade could do with less.",
    ),
}

TABLE_NOTE = (
    "Means over seeds with 95 % intervals (Student's t). FLOPs and bytes saved for backward are counted, not timed, and given "
    "as multiples of the frozen base on the same batch. The head, where there is one, is trained alike by every recipe and "
    "counts only in the size on disk."
)
FORGETS_NOTE = " “Forgets” is the rise over the frozen base of: {}."
METHOD = (
    "Each recipe looked for its learning rate in short runs, judged on batches of the training stream that those runs do not "
    "train on; the held-out data of the table took no part in that choice. Every recipe then ran with the same steps, batches, "
    "head and dropout on each seed. Differences are taken seed by seed; p values carry Holm's correction over all pairs."
)
