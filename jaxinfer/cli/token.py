"""`jaxinfer token`: makes, lists and revokes the tokens that clients of a server show."""

import json
import secrets
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from jaxinfer.cli import COMMANDS
from jaxinfer.cli.options import Json
from jaxinfer.errors import ConfigError

app = App(name="token", help=COMMANDS["token"])

File = Annotated[Path, Parameter(name=["--file", "-f"])]


@app.command
def new(*, tenant: str, file: File, scopes: str = "generate,read") -> None:
    """Prints a new token, once, and adds its salted hash to the file of security.tokens.

    A server that runs with that file takes the token within a second.

    Parameters
    ----------
    tenant
        Whose token it is. Quotas go into the same file, as
        [tenants.NAME] with requests_per_s, tokens_per_minute and concurrent.
    file
        The file; it is made where it is not there, for its owner only.
    scopes
        What the token is for, with commas: generate, read, health, admin.
    """
    from jaxinfer.server import tokens

    names = tuple(name.strip() for name in scopes.split(",") if name.strip())
    if not names:
        raise ConfigError("--scopes is empty; a token without a scope can do nothing")
    token = tokens.new_token()
    tokens.append(file, secrets.token_hex(4), tokens.entry_of(token, tenant=tenant, scopes=names))
    print(token)


@app.command(name="list")
def list_(*, file: File, as_json: Json = False) -> None:
    """Prints the id, tenant and scopes of every token of a file; the tokens are not in there.

    Parameters
    ----------
    file
        The file of security.tokens.
    as_json
        Prints one JSON object instead.
    """
    from jaxinfer.server import tokens

    found = tokens.read(file)
    if as_json:
        facts = [
            {"id": name, "tenant": one.tenant, "scopes": list(one.scopes)}
            for name, one in found.tokens.items()
        ]
        print(json.dumps({"tokens": facts}))
        return
    for name, one in found.tokens.items():
        print(f"{name}  {one.tenant}  {','.join(one.scopes)}")


@app.command
def revoke(token_id: str, *, file: File) -> None:
    """Takes a token out of a file; a server that runs with it refuses the token within a second.

    Calls that are under way go on to their end.

    Parameters
    ----------
    token_id
        Its id, as `jaxinfer token list` prints it.
    file
        The file of security.tokens.
    """
    from jaxinfer.server import tokens

    tokens.remove(file, token_id)
