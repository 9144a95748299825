"""Training with and without the distillation term, on the embedded teacher: results/distillation/.
And with a start from the teacher's weights (--init teacher): results/init/.

    python assets/ablate_distillation.py                   # all runs (some four minutes each on one core), the table, the picture
    python assets/ablate_distillation.py --arms norm0.02 teacher adamw-norm0.02 adamw-teacher --out results/init
    python assets/ablate_distillation.py --steps 50 --seeds 0 --out /tmp/ablation      # try it

Every run is train.py with the embedded recipe (8 clips of 8x64x64 a step, cosine) and one thread; runs of one seed share
a teacher's cache and see the same clips. Runs that are there already are not repeated.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt          # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
ADAMW = ["--muon-lr", "0"]
ARMS = {        # flags besides the recipe's; "none" is without the term, "paper" is Equation 4 as it stands
    "norm0.02": [],                      # first, since a cache holds the features of the run that made it
    "none": ["--distill-weight", "0"],
    "paper": ["--equation4"],
    "adamw-none": ["--distill-weight", "0", *ADAMW],
    "adamw-norm0.02": ADAMW,
    "adamw-paper": ["--equation4", *ADAMW],
    "teacher": ["--init", "teacher"],    # beside norm0.02
    "adamw-teacher": ["--init", "teacher", *ADAMW],
}
NAMES = {"none": "without", "norm0.02": "normalised features, weight 0.02", "paper": "Equation 4, weight 1",
         "teacher": "the same, begun as the teacher"}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if "teacher" not in arm])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--work", default="out/ablation", help="runs and caches (default: out/ablation)")
    p.add_argument("--out", default=str(ROOT / "results" / "distillation"), help="for curves.json and curves.png")
    args = p.parse_args()
    work, out = Path(args.work), Path(args.out)
    curves = {}
    for seed in args.seeds:
        for arm in args.arms:
            run = work / "runs" / f"{arm}-{seed}"
            if not (run / "log.jsonl").exists() or json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] < args.steps:
                subprocess.run([sys.executable, str(ROOT / "train.py"), "--seed", str(seed), "--cache", str(work / f"cache{seed}"),
                                "--cache-crops", "8", "--steps", str(args.steps), "--val-clips", "16", "--eval-every", "50", "--out", str(run),
                                "--overwrite", *ARMS[arm]], env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
            lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
            curves.setdefault(arm, {})[seed] = {line["step"]: line["psnr"] for line in lines if "psnr" in line}

    out.mkdir(parents=True, exist_ok=True)
    (out / "curves.json").write_text(json.dumps(curves, indent=1) + "\n")
    sides = {"": "Muon and AdamW, the embedded recipe", "adamw-": "AdamW alone"}
    sides = {prefix: title for prefix, title in sides.items() if any(prefix + arm in curves for arm in NAMES)}
    figure, axes = plt.subplots(1, len(sides), figsize=(5 * len(sides), 3.6), sharey=True, squeeze=False,
                                layout="constrained")
    for axis, (prefix, title) in zip(axes[0], sides.items()):
        for colour, (arm, name) in zip(("black", "tab:blue", "tab:orange", "tab:green"), NAMES.items()):
            for i, curve in enumerate(curves.get(prefix + arm, {}).values()):
                axis.plot(curve.keys(), curve.values(), color=colour, linewidth=1, label=None if i else name)
        axis.set(xlabel="step", title=title)
        axis.legend(fontsize=8)
    axes[0, 0].set(ylabel="validation PSNR in dB", ylim=(14, None))
    figure.savefig(out / "curves.png", dpi=150)

    steps = [args.steps // 6, args.steps // 3, args.steps]
    print(f"{'arm':16} PSNR in dB after {', '.join(map(str, steps))} steps: mean over {len(args.seeds)} seeds (each)")
    for arm, seeds in curves.items():
        at = [[curve[min(curve, key=lambda known: abs(known - step))] for curve in seeds.values()] for step in steps]
        print(f"{arm:16} " + "  ".join(f"{statistics.mean(v):.2f} ({', '.join(f'{x:.2f}' for x in v)})" for v in at))


if __name__ == "__main__":
    main()
