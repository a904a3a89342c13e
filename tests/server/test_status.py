"""The table from errors to statuses."""

import logging

import grpc
import pytest

from jaxinfer import errors
from jaxinfer.client import failures
from jaxinfer.server import status


def classes(root=errors.JaxinferError):
    yield root
    for child in root.__subclasses__():
        yield from classes(child)


@pytest.mark.parametrize("kind", sorted(set(classes()), key=lambda kind: kind.__name__))
def test_no_error_is_unknown(kind):
    code, reason = status.row(kind)
    assert code not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.OK)
    assert reason == reason.upper()


def test_client_and_server_agree_on_reasons():
    assert {reason: kind for kind, (_, reason) in status.TABLE.items()} == failures.REASONS
    assert (status.DOMAIN, status.DETAILS_KEY) == (failures.DOMAIN, failures.DETAILS_KEY)


def test_an_internal_error_shows_an_id_and_logs_the_rest(caplog):
    with caplog.at_level(logging.ERROR, logger="jaxinfer.server"):
        code, seen = status.status_of(ZeroDivisionError("/secret/path"))
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in seen.message and "ZeroDivision" not in seen.message
    error_id = seen.message.rpartition(" ")[2]
    assert error_id in caplog.text and "/secret/path" in caplog.text


def test_a_long_message_is_cut_to_fit_headers():
    _, seen = status.status_of(errors.InvalidRequest("é" * 5000, field="x" * 5000))
    assert len(seen.SerializeToString()) < 3000
