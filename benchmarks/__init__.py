"""Benchmarks of the suite's claims, run by `diffalign bench NAME [--quick]`.

A benchmark's module is imported when it runs.
"""

PROGRAMS = {
    "demo": ("benchmarks.demo", "the demo over several seeds, and the sources of its gain"),
    "rewards": (
        "benchmarks.rewards.rewards",
        "images per second of rewards with random weights, and the share of preprocessing",
    ),
    "memory": (
        "benchmarks.memory",
        "memory that every recipe for a published model needs, forecast without weights",
    ),
    "service": (
        "benchmarks.rewards.service",
        "latency of a reward service while another client misbehaves",
    ),
    "alignment": (
        "benchmarks.alignment",
        "pretraining with and without the semantic map: what a small model learns of relations",
    ),
    "acceleration": (
        "benchmarks.acceleration",
        "drop-in acceleration: time, PSNR and GenEval of the cache, and the way back",
    ),
    "optimise": (
        "benchmarks.optimise",
        "the plans that `diffalign optimise` finds in ten minutes, and what they cost",
    ),
    "compose": (
        "benchmarks.composition",
        "all stages of `diffalign compose` alone, in pairs and together: quality, time and bytes",
    ),
    "serving": (
        "benchmarks.serving.serving",
        "`diffalign serve` under load, beside a plain server: right images, latency, refusals",
    ),
    "suite": (
        "benchmarks.suite",
        "the suite of benchmarks on Shapes: drawing and judging, calls, and intervals by prompts",
    ),
    "solvers": ("benchmarks.solvers", "GenEval by rollout solver and number of steps"),
    "awm": (
        "benchmarks.awm.awm",
        "AWM against six other methods on one loop, and the effect of each of its levers",
    ),
    "hacking": (
        "benchmarks.hacking",
        "rewards with planted faults: the true score with and without remedies",
    ),
    "qsched": (
        "benchmarks.qsched.qsched",
        "quantized few-step students, with and without Q-Sched's factors",
    ),
    "dcgen": (
        "benchmarks.dcgen.dcgen",
        "a model before and after its move into deeply compressed latents: quality and time",
    ),
    "inversion-dpo": (
        "benchmarks.inversion_dpo.inversion_dpo",
        "Inversion-DPO against Diffusion-DPO, its released form and training on winners",
    ),
}
"""Module and description of every benchmark."""
BENCHES = {name: description for name, (_, description) in PROGRAMS.items()}
