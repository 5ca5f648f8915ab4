"""Benchmarks of the suite's claims: `diffalign bench NAME [--quick]`. Names are strings, modules are imported on use."""

BENCHES = {
    "demo": "the demo over seeds, and where its gain comes from",
}
