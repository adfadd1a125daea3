"""Fail unless a run's result.json shows a converted model that computes what was trained, at its accuracy."""

import json
import sys
from pathlib import Path

result = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
lowered = result["lowered"]
checks = {
    "reference equals the frozen model": result["parity"]["reference_equals_fake_quant"] is True,
    "reference accuracy equals fake-quant accuracy": result["reference_accuracy"] == result["fake_quant_accuracy"],
    "within 1.0 point of float": result["reference_accuracy"] >= result["float_accuracy"] - 1.0,
    "float accuracy is that of a trained model": result["float_accuracy"] >= 95.0,
    "x86 and onednn were lowered": {"x86", "onednn"} <= lowered.keys(),
    "lowered accuracy within 0.1 point of the reference": all(
        abs(low["accuracy"] - result["reference_accuracy"]) <= 0.1 for low in lowered.values()
    ),
    "lowered argmax agreement at least 99.9 %": all(low["argmax_agreement"] >= 99.9 for low in lowered.values()),
    "4 bits on average, but for the first and last layer": 4.0 <= result["mean_weight_bits"] <= 4.1,
    "weights pack to less than a seventh": result["weights_bytes"]["ideal"] * 7 < result["weights_bytes"]["float"],
}
for what, holds in checks.items():
    print(f"{'ok  ' if holds else 'FAIL'} {what}")
sys.exit(0 if all(checks.values()) else 1)
