"""Tokens of pushes: every forgery is refused, and none ends the endpoint."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import TYPE_CHECKING, Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import RSAAlgorithm

from adapters.push import oidc
from adapters.push.oidc import TokenRefusedError, TokenVerifier

if TYPE_CHECKING:
    from collections.abc import Callable

FAR = 4_000_000_000  # a time in the year 2096
AUDIENCE, ACCOUNT = "https://me.example", "pusher@p.iam.gserviceaccount.com"
KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
OTHER_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
JWK: dict[str, Any] = json.loads(RSAAlgorithm.to_jwk(KEY.public_key())) | {"kid": "k1", "use": "sig", "alg": "RS256"}
PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


@pytest.fixture
def verifier(monkeypatch: pytest.MonkeyPatch) -> TokenVerifier:
    monkeypatch.setattr(oidc, "_download", lambda _: json.dumps({"keys": [JWK]}).encode())
    return TokenVerifier(AUDIENCE, ACCOUNT)


def claims(**changed: Any) -> dict[str, Any]:
    """Return Google's claims. A claim that is None is left out."""
    now = int(time.time())
    own = {"iss": "https://accounts.google.com", "aud": AUDIENCE, "iat": now, "exp": now + 600, "sub": "1"}
    mine = own | {"email": ACCOUNT, "email_verified": True} | changed
    return {name: value for name, value in mine.items() if value is not None}


def token(key: rsa.RSAPrivateKey = KEY, headers: dict[str, Any] | None = None, **changed: Any) -> str:
    payload = json.dumps(claims(**changed)).encode()
    return jwt.PyJWS().encode(payload, key, "RS256", headers={"kid": "k1"} | (headers or {}))


def with_parts(header: str, payload: bytes = b"", signature: bytes = b"x" * 256) -> str:
    """Return a token with any text as its header."""
    parts = header.encode(), payload or json.dumps(claims()).encode(), signature
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def with_hmac(key: bytes) -> str:
    """Return a token that is signed with a public value as the key of HS256."""
    signed = with_parts('{"alg":"HS256","kid":"k1"}', signature=b"").removesuffix(".")
    signature = base64.urlsafe_b64encode(hmac.new(key, signed.encode(), hashlib.sha256).digest())
    return f"{signed}.{signature.rstrip(b'=').decode()}"


@pytest.mark.parametrize(
    "make",
    [
        lambda: f"Bearer {token()}",
        lambda: f"bearer {token()}",
        lambda: f"Bearer {token(aud=['https://x', AUDIENCE])}",
        lambda: f"Bearer {token(exp=int(time.time()) - 5)}",  # clocks can differ
    ],
)
def test_token_of_google_is_accepted(make: Callable[[], str], verifier: TokenVerifier) -> None:
    """The scheme has no case, and an audience can be one of several."""
    verifier.verify(make())


@pytest.mark.parametrize(
    "authorization",
    ["", "Basic abc", "Bearer ", "Bearer a.b.c", "Bearer \xff\xfe.\xff.\xff", "Bearer  TOKEN", 'Bearer "TOKEN"'],
)
def test_other_credentials_are_refused(authorization: str, verifier: TokenVerifier) -> None:
    """Any text can be in the header."""
    with pytest.raises(TokenRefusedError):
        verifier.verify(authorization.replace("TOKEN", token()))


@pytest.mark.parametrize(
    "changed",
    [
        *({name: None} for name in ("exp", "iat", "aud", "iss", "email", "email_verified")),
        {"exp": 1},
        {"exp": "never"},
        {"nbf": FAR},
        {"iat": FAR},
        {"aud": "https://other.example"},
        {"aud": f"{AUDIENCE}/"},
        {"aud": {AUDIENCE: 1}},
        {"iss": "https://evil.example"},
        {"iss": "http://accounts.google.com"},
        {"iss": ["https://accounts.google.com"]},
        {"email": "someone@else.iam.gserviceaccount.com"},
        {"email": ACCOUNT.upper()},
        {"email_verified": False},
        {"email_verified": "true"},
        {"email_verified": 1},
    ],
)
def test_token_with_other_claims_is_refused(changed: dict[str, Any], verifier: TokenVerifier) -> None:
    """Google signs the tokens of all its customers."""
    with pytest.raises(TokenRefusedError):
        verifier.verify(f"Bearer {token(**changed)}")


@pytest.mark.parametrize(
    "forge",
    [
        lambda: with_parts("{}", signature=b""),
        lambda: with_parts('{"alg":"none","kid":"k1"}', signature=b""),
        lambda: with_parts('{"alg":"nOnE","kid":"k1"}', signature=b""),
        lambda: with_hmac(PEM),
        lambda: with_hmac(JWK["n"].encode()),
        lambda: token(OTHER_KEY),
        lambda: token(headers={"kid": "zzz"}),
        lambda: token(headers={"kid": "../../../../dev/null"}),
        lambda: token(OTHER_KEY, {"jwk": json.loads(RSAAlgorithm.to_jwk(OTHER_KEY.public_key()))}),
        lambda: token(OTHER_KEY, {"jku": "https://evil.example/keys"}),
        lambda: token(OTHER_KEY, {"x5u": "https://evil.example/keys"}),
        lambda: token(headers={"crit": ["x"], "x": 1}),
        lambda: with_parts("{{{"),
        lambda: with_parts("[]"),
        lambda: with_parts('{"kid":"k1"}'),
        lambda: with_parts('{"alg":"RS256","kid":[]}'),
        lambda: with_parts('{"alg":"RS256","kid":null}'),
        lambda: with_parts('{"alg":"RS256","kid":"k1","x":' + "9" * 5_000 + "}"),
        lambda: with_parts("[" * 3_000),
        lambda: with_parts('{"a":' * 20_000),
        lambda: with_parts('{"alg":"RS256","kid":"k1"}', b"[" * 20_000),
    ],
)
def test_forged_token_is_refused(forge: Callable[[], str], verifier: TokenVerifier) -> None:
    """Neither the algorithm, nor a key, nor an address in the token counts. No header can end the endpoint."""
    with pytest.raises(TokenRefusedError):
        verifier.verify(f"Bearer {forge()}")
