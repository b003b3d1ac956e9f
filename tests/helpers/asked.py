"""Planted tables of the probe `uncertainty` and of `bypass`, in which every claim of the paper holds."""

from weightgeom.table import arm_columns, row, tabulate

ARM = arm_columns("heldout", against="known")


def probed(changed=(), step=0, stderr=0.1):
    """Rows of two layers in which every claim agrees, but for what is changed to a value with its ends."""
    agreeing = {
        "auroc_logistic": (0.9, 0.8, 1.0),
        "mle_dimension_ratio": (2.4, 2.1, 2.7),
        "mle_dimension_calibrated_ratio": (2.4, 2.1, 2.7),
        "amplification": (0.5, 0.4, 0.6),
        "fisher_ratio": (0.3, 0.2, 0.4),
        "fisher_sensitivity": (0.3, 0.2, 0.4),
        "gradient_coupling": (0.01, 0.0, 0.02),
        **dict(changed),
    }
    best = agreeing.pop("auroc_logistic_max_p_value", 0.025)
    rows = []
    for layer in (0, 1):
        place = {"layer": layer, "step": step, "subspace": "residual"}
        for quantity, (value, low, high) in agreeing.items():
            scale = 1 + 9 * layer if quantity == "amplification" else 1 + layer / 100
            for end, number in (("", value), ("_low", low), ("_high", high)):
                error = stderr if not end else None
                rows.append(row(f"{quantity}{end}", number * scale, n=60, **ARM, stderr=error, **place))
        for quantity, value in {
            "gradient_coupling_random_sd": 0.05, "fisher_sensitivity_random": 1.0,
            "fisher_sensitivity_random_sd": 0.1, "fisher_sensitivity_output": 9.0,
        }.items():  # fmt: skip
            rows.append(row(quantity, value, n=39, **ARM, **place))
        if best is not None:
            rows.append(row("auroc_logistic_max_p_value", best, n=39, **ARM, **place))
        for space in ("output_top", "output_bottom"):
            for end, number in (("", 0.3), ("_low", 0.2), ("_high", 0.4)):
                rows.append(row(f"overlap{end}", number, n=60, k=4, **ARM, **{**place, "subspace": space}))
        at = arm_columns("heldout", "0.15", against="known")
        rows.append(row("components_difference", 0.4, n=48, **at, **place))
        rows.append(row("components_difference_p_value", 0.05, n=39, **at, **place))
        for group in ("known", "heldout"):
            for quantity in ("mle_dimension_calibrated", "persistence_entropy", "longest_loop"):
                for end in ("", "_low", "_high"):
                    rows.append(row(f"{quantity}{end}", 1.0, n=60, **arm_columns(group), **place))
            for threshold in ("0.1", "0.15"):
                for end in ("", "_low", "_high"):
                    rows.append(row(f"components{end}", 0.5, n=48, **arm_columns(group, threshold), **place))
    return rows


def bypassed(change=0.6, controls=19):
    """Bypass in two layers, at its best in layer 1; a control has its own best in layer 0, of 0.2 at most."""
    rows = []
    for layer in (0, 1):
        for effect, value in (("abstention_change", change * layer), ("false_abstention_change", 0.1)):
            place = {"step": 0, "layer": layer, "subspace": "residual", "n": 60, "stderr": 0.05}
            rows.append(row(effect, value, **arm_columns("bypass", "4"), **place))
            for draw in range(controls):
                control = (0.1 + 0.2 * draw / (controls - 1)) * (1 - layer)
                value = control if effect == "abstention_change" else 0.1
                rows.append(row(effect, value, **arm_columns("random", "4", draw=draw), **place))
            place |= {"stderr": None, "n": controls}
            rows.append(
                row(f"{effect}_p_value", 0.05, **arm_columns("bypass", "4", against="random"), **place)
            )
    return tabulate(rows)
