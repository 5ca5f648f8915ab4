"""Benchmarks of the suite's claims, run by `diffalign bench NAME [--quick]`.

A benchmark's module is imported when it runs.
"""

BENCHES = {
    "demo": "the demo over several seeds, and the sources of its gain",
    "rewards": "images per second of rewards with random weights, and the share of preprocessing",
    "memory": "memory that every recipe for a published model needs, forecast without weights",
    "service": "latency of a reward service while another client misbehaves",
    "solvers": "GenEval by rollout solver and number of steps",
    "awm": "AWM against Flow-GRPO and DiffusionNFT on one loop, and the effect of each of its levers",
    "qsched": "quantized few-step students, with and without Q-Sched's factors",
    "dcgen": "a model before and after its move into deeply compressed latents: quality and time",
    "inversion-dpo": "Inversion-DPO against Diffusion-DPO, its released form and training on winners",
}
PROGRAMS = {
    "demo": "benchmarks.demo",
    "rewards": "benchmarks.rewards.rewards",
    "memory": "benchmarks.memory",
    "service": "benchmarks.rewards.service",
    "solvers": "benchmarks.solvers",
    "awm": "benchmarks.awm.awm",
    "qsched": "benchmarks.qsched.qsched",
    "dcgen": "benchmarks.dcgen.dcgen",
    "inversion-dpo": "benchmarks.inversion_dpo.inversion_dpo",
}
