"""The file of tokens, and the command that writes it."""

import json
import os
import stat
from datetime import UTC, datetime, timedelta

import pytest

from jaxinfer.cli import run
from jaxinfer.errors import ConfigError, Unauthenticated
from jaxinfer.server import tokens
from jaxinfer.server.watched import Watched

WHOLE = f"[tokens.a]\ntenant = 't'\nscopes = []\nsalt = '{'0' * 32}'\nhash = '{'0' * 64}'\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tokens.toml"
    entry = tokens.entry_of(tokens.new_token(), tenant="t", scopes=("generate",))
    tokens.append(path, "first", entry)
    return path


def test_files_are_looked_at_once_in_a_while(tmp_path):
    path, now_s = tmp_path / "a", [0.0]
    path.write_text("1")
    watched = Watched([path], path.read_text, every_s=1.0, clock=lambda: now_s[0])
    path.write_text("22")
    assert watched.now() == "1"
    now_s[0] = 1.0
    assert watched.now() == "22"


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o660, 0o777])
def test_a_file_that_others_can_touch_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(ConfigError, match="security.tokens.*chmod 600"):
        tokens.read(file)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[tokens.a]\ntenant = 't'\n", "tokens.a.*hash, salt, scopes is missing"),
        ("[tokens.a]\ntenan = 't'\n", "tokens.a"),
        ("[tenants.a]\nrequest_per_s = 1.0\n", "did you mean requests_per_s"),
        ("[tenants.a]\nconcurrent = -1\n", "concurrent is -1"),
        (WHOLE + "expires = 'tomorrow'\n", "tokens.a.*expires is 'tomorrow'"),
        (WHOLE + "expires = '2027-01-31T12:00:00'\n", "with its time zone"),
        ("tokens = 3\n", r"unknown key tokens"),
        ("[tokens", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_a_config_error_that_names_the_place(file, text, match):
    file.write_text(text)
    with pytest.raises(ConfigError, match=match) as caught:
        tokens.read(file)
    assert str(file) in str(caught.value)


def test_the_command_makes_lists_and_revokes(tmp_path, capsys):
    file = tmp_path / "tokens.toml"
    assert run(["token", "new", "--tenant", "acme", "--scopes", "generate", "-f", str(file)]) == 0
    token = capsys.readouterr().out.strip()
    assert len(token) == len("jxi_") + 43
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert token not in file.read_text()
    caller = tokens.read(file).find(token)
    assert caller is not None and (caller.tenant, caller.scopes) == ("acme", {"generate"})
    assert run(["token", "new", "--tenant", "b-2", "-f", str(file)]) == 0
    capsys.readouterr()
    file.write_text(file.read_text() + "\n# ours\n[tenants.acme]\nconcurrent = 2\n")
    assert run(["token", "list", "-f", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1:] for line in lines] == [
        ["acme", "generate"],
        ["b-2", "generate,read"],
    ]
    assert run(["token", "revoke", lines[0].split()[0], "-f", str(file)]) == 0
    kept = tokens.read(file)
    assert kept.find(token) is None and len(kept.tokens) == 1
    assert kept.quotas["acme"].concurrent == 2 and "# ours" in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["new", "--tenant", "a/b"], "tenant is 'a/b'"),
        (["new", "--tenant", "a", "--scopes", "all"], "the scopes are generate"),
        (["new", "--tenant", "a", "--scopes", ""], "--scopes is empty"),
        (["new", "--tenant", "a", "--expires", "soon"], "90d, 12h, 30m"),
        (["revoke", "nobody"], "no token with the id 'nobody'"),
    ],
)
def test_the_command_says_what_is_wrong(file, arguments, says, capsys):
    assert run(["token", *arguments, "-f", str(file)]) == 2
    assert says in capsys.readouterr().err


def test_a_token_with_an_expiry_is_refused_from_then_on(tmp_path, capsys):
    file, now = tmp_path / "tokens.toml", datetime.now(UTC)
    assert run(["token", "new", "--tenant", "a", "--expires", "90d", "-f", str(file)]) == 0
    token = capsys.readouterr().out.strip()
    found = tokens.read(file)
    caller = found.find(token, now=now + timedelta(days=89))
    assert caller is not None and caller.tenant == "a"
    with pytest.raises(Unauthenticated, match="the token expired on 20.*ask for a new one"):
        found.find(token, now=now + timedelta(days=90, minutes=1))
    assert found.find("jxi_other", now=now + timedelta(days=100)) is None
    assert run(["token", "list", "-f", str(file)]) == 0
    assert "until 20" in capsys.readouterr().out
    assert run(["token", "list", "-f", str(file), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["tokens"]
    assert datetime.fromisoformat(entry["expires"]) - now > timedelta(days=89)


def test_lifetimes_are_days_hours_and_minutes():
    now = datetime(2027, 1, 1, tzinfo=UTC)
    assert tokens.expiry("90d", now=now) == "2027-04-01T00:00:00+00:00"
    assert tokens.expiry("12h", now=now) == "2027-01-01T12:00:00+00:00"
    assert tokens.expiry("30m", now=now) == "2027-01-01T00:30:00+00:00"
    for wrong in ("0d", "90", "d", "-1d", "1.5h", "123456d"):
        with pytest.raises(ConfigError, match="--expires"):
            tokens.expiry(wrong)
