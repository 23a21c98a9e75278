"""Two pictures of a profile: each hot path under this machine's roof, and where the time goes."""

from __future__ import annotations

from pathlib import Path

from .profile_report import Profile

SMALLEST = 0.005
"""share of the step below which a hot path is not drawn"""


def plot_profile(profile: Profile, out: Path) -> list[Path]:
    """Draw `roofline.png` and `hotpaths.png` into the folder `out` and return their paths."""
    return [_roofline(profile, out / "roofline.png"), _bars(profile, out / "hotpaths.png")]


def _title(profile: Profile) -> str:
    return f"{profile.preset}, {profile.precision}, {profile.shape[0]} samples, {profile.device}"


def _roofline(profile: Profile, path: Path) -> Path:
    """FLOP/s over FLOPs per byte; hot paths without FLOPs are not in it."""
    from matplotlib.figure import Figure  # a bare Figure draws with Agg: no display, no global state

    copy, matmul = profile.rates["copy"], profile.matmul
    ridge = matmul / copy
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    low, high = ridge / 30, ridge * 30
    for report, marker, color in zip(profile.reports, "os", ("tab:blue", "tab:orange"), strict=False):
        rows = [r for r in report.rows if r.flops and r.bytes and r.seconds and r.share >= SMALLEST]
        for row in rows:
            x, y = row.flops / row.bytes, row.flops / row.seconds
            low, high = min(low, x / 2), max(high, x * 4)
            axes.scatter(x, y, s=30 + 1500 * row.share, marker=marker, color=color, alpha=0.4, linewidths=0)
            axes.annotate(row.name, (x, y), fontsize=6, xytext=(4, 3), textcoords="offset points")
        axes.scatter([], [], marker=marker, color=color, alpha=0.4, label=f"backend {report.backend}")
    axes.plot([low, ridge, high], [low * copy, matmul, matmul], color="black", linewidth=1.2,
              label=f"measured: copy {copy / 1e9:,.0f} GB/s, matmul {matmul / 1e9:,.0f} GFLOP/s")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must move", ylabel="FLOP/s")
    axes.set_title(f"{_title(profile)}; area: share of the step")
    axes.grid(alpha=0.3, which="both", linewidth=0.4)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    return path


def _bars(profile: Profile, path: Path) -> Path:
    """Milliseconds per step, and beside each bar what share of its ceiling it reaches."""
    from matplotlib.figure import Figure

    ours = profile.reports[0]
    rows = [row for row in ours.rows if row.share >= SMALLEST]
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows) * len(profile.reports)), layout="constrained")
    axes = figure.add_subplot()
    thick = 0.8 / len(profile.reports)
    for place, report in enumerate(profile.reports):
        times = {row.path: row.seconds * 1e3 for row in report.rows}
        values = [times.get(row.path, 0.0) for row in rows]
        axes.barh([i + place * thick for i in range(len(rows))], values, height=thick, label=report.backend)
    for i, row in enumerate(rows):
        reached = max(row.of_copy, row.of_matmul)
        if reached:
            ceiling = "copy" if row.of_copy >= row.of_matmul else "matmul"
            axes.annotate(f"{reached:.0%} of {ceiling}", (row.seconds * 1e3, i), fontsize=7, va="center",
                          xytext=(4, 0), textcoords="offset points")  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2, y=0.01)
    axes.set(xlabel="ms per step", title=_title(profile))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
    return path
