"""Plain server to compare with: FastAPI and a loop that draws one request after the other."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from torch import Tensor

from diffalign.pipelines.base import TextToImageModel
from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.sampler import Sampler
from diffalign.web.images import encode_image
from diffalign.web.listening import address_of, listen

HOST = "127.0.0.1"


def draw(model: TextToImageModel, body: dict[str, Any]) -> Tensor:
    """Return the image (3, H, W) uint8 of a request, drawn alone."""
    width, height = (int(side) for side in body["size"].split("x"))
    drawing = Drawing(
        body["num_inference_steps"],
        body.get("guidance_scale"),
        (height, width),
        mixed_precision="no",
    )
    return Sampler(model, drawing).images([body["prompt"]], [body["seed"]]).images[0]


def build(name: str) -> FastAPI:
    """Return the application of a model."""
    model = load_model(name, dtype=torch.float32)
    app, turn = FastAPI(), asyncio.Lock()

    @app.post("/v1/images/generations")
    async def generate(body: dict[str, Any]) -> dict[str, Any]:
        async with turn:
            image = await asyncio.to_thread(draw, model, body)
            return {"data": [{"b64_json": await asyncio.to_thread(encode_image, image)}]}

    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    listening = listen(HOST, 0)
    application = build(sys.argv[1])
    print(f"listening on {address_of(listening, HOST)}", flush=True)
    uvicorn.Server(uvicorn.Config(application, log_level="error")).run(sockets=[listening])
