"""Benchmarks of the suite's claims: `diffalign bench NAME [--quick]`. Modules are imported on use."""

BENCHES = {
    "demo": "the demo over seeds, and where its gain comes from",
    "rewards": "images a second of rewards with random weights, and the share of preprocessing",
    "service": "how long good requests to a reward service take while another client misbehaves",
    "solvers": "GenEval by number of steps of the rollout's solvers",
    "awm": "AWM against Flow-GRPO and DiffusionNFT on one loop, and what each of its levers gives",
    "qsched": "smaller weights, and factors of the schedule that repair them, on few-step students",
    "dcgen": "a model before and after it moved into deeply compressed latents, and where its time goes",
    "inversion-dpo": "Inversion-DPO against Diffusion-DPO, its released form and training on winners",
}
PROGRAMS = {
    "demo": "benchmarks.demo",
    "rewards": "benchmarks.rewards.rewards",
    "service": "benchmarks.rewards.service",
    "solvers": "benchmarks.solvers",
    "awm": "benchmarks.awm.awm",
    "qsched": "benchmarks.qsched.qsched",
    "dcgen": "benchmarks.dcgen.dcgen",
    "inversion-dpo": "benchmarks.inversion_dpo.inversion_dpo",
}
