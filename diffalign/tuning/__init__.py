"""The search for Q-Sched's factors: objectives, engines, the images that candidates draw, and what is accepted."""
