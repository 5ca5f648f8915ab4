"""Plain server to compare with: FastAPI and a loop that draws one request after the other."""

from __future__ import annotations

import asyncio
import base64
import io
import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from diffalign.pipelines.drawing import Drawing
from diffalign.pipelines.registry import load_model
from diffalign.pipelines.sampler import Sampler
from diffalign.web.listening import address_of, listen

HOST = "127.0.0.1"


def build(name: str) -> FastAPI:
    """Return the application of a model."""
    model = load_model(name, dtype=torch.float32)
    app, turn = FastAPI(), asyncio.Lock()

    def draw(body: dict[str, Any]) -> str:
        width, height = (int(side) for side in body["size"].split("x"))
        drawing = Drawing(
            body["num_inference_steps"],
            body.get("guidance_scale"),
            (height, width),
            mixed_precision="no",
        )
        image = Sampler(model, drawing).images([body["prompt"]], [body["seed"]]).images[0]
        buffer = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG", compress_level=1)
        return base64.b64encode(buffer.getvalue()).decode()

    @app.post("/v1/images/generations")
    async def generate(body: dict[str, Any]) -> dict[str, Any]:
        async with turn:
            return {"data": [{"b64_json": await asyncio.to_thread(draw, body)}]}

    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app


if __name__ == "__main__":
    listening = listen(HOST, 0)
    application = build(sys.argv[1])
    print(f"listening on {address_of(listening, HOST)}", flush=True)
    uvicorn.Server(uvicorn.Config(application, log_level="error")).run(sockets=[listening])
