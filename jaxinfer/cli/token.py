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
def new(*, tenant: str, file: File, scopes: str = "generate,read", expires: str = "") -> None:
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
    expires
        How long a server takes it: 90d, 12h or 30m; without it until it is revoked.
    """
    from jaxinfer.server import tokens

    names = tuple(name.strip() for name in scopes.split(",") if name.strip())
    if not names:
        raise ConfigError("--scopes is empty; a token without a scope can do nothing")
    until, token = tokens.expiry(expires) if expires else "", tokens.new_token()
    entry = tokens.entry_of(token, tenant=tenant, scopes=names, expires=until)
    tokens.append(file, secrets.token_hex(4), entry)
    print(token)


@app.command(name="list")
def list_(*, file: File, as_json: Json = False) -> None:
    """Prints the id, tenant, scopes and expiry of every token of a file, and no token.

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
            {
                "id": name,
                "tenant": one.tenant,
                "scopes": list(one.scopes),
                "expires": one.expires or None,
            }
            for name, one in found.tokens.items()
        ]
        print(json.dumps({"tokens": facts}))
        return
    for name, one in found.tokens.items():
        until = f"  until {one.expires}" if one.expires else ""
        print(f"{name}  {one.tenant}  {','.join(one.scopes)}{until}")


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
