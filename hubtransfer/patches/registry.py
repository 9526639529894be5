"""The table of patches: one row a kind."""

from hubtransfer.patches.patch import PATCHES


def patches() -> list[dict[str, str]]:
    """One row for each kind of patch: kind, class of the config, paper, and one line on what it is.

    Examples:
        >>> [row["kind"] for row in patches()]
        ['column', 'deepen', 'depthwise', 'earlier_units', 'peft', 'scale_bias', 'split', 'widen']
    """
    rows = [
        {"kind": kind, "class": config.__name__, "paper": config.paper, "summary": config.summary}
        for kind, config in PATCHES.items()
    ]
    rows.append(
        {
            "kind": "peft",
            "class": "peft.PeftConfig",
            "paper": "Hu 2022 (LoRA) and others",
            "summary": "any tuner of peft that adapts layers: LoRA, IA3, LoHa, LoKr, OFT, VeRA, LNTuning, ...",
        }
    )
    return sorted(rows, key=lambda row: row["kind"])
