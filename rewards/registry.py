"""Registry of rewards by name.

Entries are strings until one is used, so that listing them imports neither torch nor a model. A name is a built-in one,
an entry point of an installed package, `remote:` with the address of a service, that of a custom class or function
(`rewards.own`), or `rank:` with one of these.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from diffalign.core.nearest import nearest
from diffalign.core.text import RANK, REMOTE
from diffalign.rewards import own
from diffalign.rewards.own import UnknownReward

if TYPE_CHECKING:
    from diffalign.rewards.base import Reward

__all__ = ["UnknownReward", "available", "check_name", "create"]
ENTRY_POINT_GROUP = "diffalign.rewards"
BUILT_IN = {
    "verifier": "diffalign.rewards.verifier:VerifierReward",
    "shapes_clip": "diffalign.rewards.shapes_clip:ShapesClipReward",
    "geneval": "diffalign.rewards.geneval:GenEvalReward",
    "geneval_compat": "diffalign.rewards.geneval:GenEvalCompatReward",
    "jpeg": "diffalign.rewards.jpeg:JpegReward",
    "flatness": "diffalign.rewards.flatness:FlatnessReward",
    "ocr": "diffalign.rewards.ocr:OcrReward",
    "clip_score": "diffalign.rewards.clip_score:ClipScoreReward",
    "clip_iqa": "diffalign.rewards.clip_iqa:ClipIqaReward",
    "pickscore": "diffalign.rewards.pickscore:PickScoreReward",
    "hpsv2": "diffalign.rewards.hpsv2:HPSv2Reward",
    "hpsv2.1": "diffalign.rewards.hpsv2:HPSv21Reward",
    "image_reward": "diffalign.rewards.image_reward:ImageReward",
    "vlm_judge": "diffalign.rewards.vlm_judge:VlmJudgeReward",
    "hpsv3": "diffalign.rewards.hpsv3:HPSv3Reward",
    "aesthetic": "diffalign.rewards.aesthetic:AestheticReward",
    "p_yes": "diffalign.rewards.p_yes:PYesReward",
    "unified_reward": "diffalign.rewards.unified_reward:UnifiedReward",
    "unified_reward_pair": "diffalign.rewards.unified_reward:UnifiedPairReward",
    "rational_rewards": "diffalign.rewards.rational_rewards:RationalReward",
}
SUMMARIES = {
    "verifier": "GenEval score of a Shapes image by the exact verifier",
    "shapes_clip": "agreement of a Shapes image and its prompt by a tiny CLIP; offline",
    "geneval": "GenEval score of a photograph by Mask2Former and CLIP",
    "geneval_compat": "geneval with the position bug of Flow-GRPO's and AWM's release",
    "flatness": "how near a Shapes image is to pure colours; does not look at the prompt",
    "jpeg": "compressibility: how few bytes the image takes as JPEG",
    "ocr": "is the prompt's quoted text in the image? PP-OCR, offline",
    "clip_score": "agreement of image and prompt by CLIP ViT-L/14",
    "clip_iqa": "good photo or bad photo? by CLIP ViT-L/14; does not look at the prompt",
    "pickscore": "PickScore v1: choices of users",
    "hpsv2": "Human Preference Score v2",
    "hpsv2.1": "Human Preference Score v2.1",
    "image_reward": "ImageReward v1.0: choices of experts, by BLIP",
    "vlm_judge": "a vision-language model over HTTP (OpenAI's chat completions)",
    "hpsv3": "Human Preference Score v3, by Qwen2-VL-7B",
    "p_yes": "does the image show the prompt? probability of a yes, by any judge",
    "unified_reward": "UnifiedReward 2.0: alignment, coherence and style",
    "unified_reward_pair": "UnifiedReward 2.0 between a prompt's images, in both orders",
    "rational_rewards": "RationalRewards: faithfulness, quality and text, with reasons",
    "aesthetic": "LAION aesthetic predictor v2; does not look at the prompt",
}


def available() -> dict[str, str]:
    """Return name and "module:Class" of built-in rewards and those of installed packages."""
    targets = dict(BUILT_IN)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        targets.setdefault(point.name, point.value)
    return targets


def check_name(name: str, *, setting: str = "rewards") -> None:
    """Raise UnknownReward, with the nearest valid name, for an unknown reward.

    Args:
        setting: setting that holds the name, for the message.
    """
    name = name.removeprefix(RANK)
    if name.startswith(REMOTE):
        return
    targets = available()
    if name not in targets and own.is_own(name):
        own.check(name, setting=setting)
    elif name not in targets:
        names = ", ".join(sorted(targets))
        hint = nearest(
            name,
            targets,
            otherwise=f"known are {names}; a reward of your own is FILE.py:NAME",
        )
        raise UnknownReward(f"unknown reward {name!r}{hint}", setting=setting)


def create(name: str, *, setting: str = "rewards") -> Reward:
    """Return an instance of the named reward.

    Its weights are loaded now or at its first score. The card of a reward in a user's file has the file's digest as its
    revision.

    Args:
        setting: setting that holds the name, for messages.
    """
    check_name(name, setting=setting)
    if name.startswith(RANK):
        from diffalign.rewards.groups import RankReward

        return RankReward(create(name.removeprefix(RANK), setting=setting))
    if name.startswith(REMOTE):
        from diffalign.rewards.remote import RemoteReward

        return RemoteReward(name)
    targets = available()
    if name not in targets:
        from diffalign.rewards.function import as_reward

        reward = as_reward(own.load(name, setting=setting), name=name)
        if digest := own.digest(name):
            reward.declare(revision=digest[:12])
        return reward
    module, _, attribute = targets[name].partition(":")
    kind: type[Reward] = getattr(import_module(module), attribute)
    return kind()
