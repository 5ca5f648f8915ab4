"""Search for Q-Sched's factors: objectives, engines, evaluation of candidates, acceptance."""
