"""Real servers on loopback for tests."""

import contextlib
import threading
import time

from diffalign.serving.start import Call, ServerSettings, build_service, listen


@contextlib.contextmanager
def running(model, *, token=None, call=None, **settings):
    """Yield the service of a model and its address, and stop the server at the end."""
    from diffalign.serving.app import build_app
    from diffalign.web.connections import make_server

    settings = ServerSettings(port=0, max_wait_ms=0, **settings)
    call = call or Call("models/tiny", 4, None)
    service = build_service(model, settings, call, token=token)
    listening = listen("127.0.0.1", 0)
    server = make_server(build_app(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    service.engine.start()
    service.is_ready = True
    thread.start()
    try:
        yield service, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def until(condition, seconds=20.0):
    """Wait until a condition holds; return whether it does."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        threading.Event().wait(0.005)
    return condition()
