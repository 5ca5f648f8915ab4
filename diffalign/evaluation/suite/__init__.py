"""Benchmarks that ask a judge: questions, replies, rules, intervals and pages."""
