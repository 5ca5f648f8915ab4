"""Errors of the hub's client are one line with advice, wherever they appear."""

import pytest

from diffalign.core import hub


def error_named(name, *, module="huggingface_hub.errors", code=None):
    """Return an error of a class with this name, whose response has a status."""
    kind = type(name, (Exception,), {"__module__": module})
    error = kind("x")
    error.response = type("Response", (), {"status_code": code})()
    return error


@pytest.mark.parametrize(
    ("name", "code", "advice"),
    [
        ("GatedRepoError", None, "owner/name is gated: accept its licence"),
        ("HfHubHTTPError", 403, "owner/name is gated: accept its licence"),
        ("RevisionNotFoundError", 404, "owner/name has no revision 'v2'"),
        ("EntryNotFoundError", 404, "owner/name has no such file"),
        ("LocalEntryNotFoundError", None, "`hf download owner/name`"),
        ("OfflineModeIsEnabled", None, "the hub cannot be reached"),
        ("RepositoryNotFoundError", 401, "a private one needs `hf auth login`"),
    ],
)
def test_every_error_has_its_advice(name, code, advice):
    assert advice in hub.explain(error_named(name, code=code), "owner/name", revision="v2")


def test_other_errors_have_none():
    assert hub.explain(KeyError("x"), "owner/name") is None
    assert hub.explain(error_named("HTTPError", module="requests", code=404)) is None
    assert hub.explain(error_named("HfHubHTTPError", code=500)) is None
