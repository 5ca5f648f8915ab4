"""Benchmarks of the suite's claims: `diffalign bench NAME [--quick]`. Modules are imported on use."""

BENCHES = {
    "demo": "the demo over seeds, and where its gain comes from",
}
