"""`diffalign evaluate`, with one verb below it per kind of evaluation."""

from __future__ import annotations

from diffalign.cli import evaluate_model, fid, geneval, report, score, suite, wins
from diffalign.cli.verb import Verb

VERB = Verb(
    "evaluate",
    "score a model, a folder of images, or two folders beside each other",
    evaluate_model.add_flags,
    evaluate_model.run,
    flags=evaluate_model.Flags,
    verbs=(
        *(evaluate_model.VERB, score.VERB, geneval.VERB),
        *(suite.VERB, fid.VERB, wins.VERB, report.VERB),
    ),
    description="Score a model or images. Without a verb below it, `diffalign evaluate` is `diffalign evaluate model`.",
    epilog="""examples:
  diffalign evaluate --model shapes-sd3 --lora runs/demo/lora --rewards verifier
  diffalign evaluate rewards --images runs/images --rewards jpeg
  diffalign evaluate fid --generated runs/images --reference photos
  diffalign evaluate wins --images runs/after --against runs/before --rewards pickscore
  diffalign evaluate report --folders base=runs/before lora=runs/after --output report.html

`diffalign evaluate VERB --help` shows the flags of each.""",
)
