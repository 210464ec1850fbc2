"""A small certificate authority: one folder, with keys for a server and for workers.

A worker's certificate has the worker's name, and makes no server. Keys are of the curve P-256 and
are written so that only their owner can read them.
"""

from __future__ import annotations

import os
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

from lightning_easgd.schedules.checks import require
from lightning_easgd.server.certificates import SERVER, SERVER_NAME, Certificates

try:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "Making certificates needs cryptography: pip install -e '.[async]'."
    ) from error

_AUTHORITY = "authority"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def make_certificates(
    folder: str | os.PathLike[str], name: str, *, days: int = 365
) -> Certificates:
    """Keys and certificate of a party, signed by the authority of the folder.

    The authority is made with the first of them. Give each site its own three files only: the
    authority's certificate, the site's certificate and the site's key.

    Args:
        folder: of the authority; made if it is not there.
        name: of the worker or site, or "server".
        days: for which the certificate is valid.

    Raises:
        ValueError: the name is none for a file.
        FileExistsError: this party has a key, which stays as it is.
    """
    allowed = f"letters, digits and _.-, at most 64, and not '{_AUTHORITY}'"
    require("name", name, allowed, _NAME.fullmatch(name) is not None and name != _AUTHORITY)
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (path / f"{_AUTHORITY}.key").exists():
        _make_authority(path, 10 * 365)
    made = Certificates(path / f"{_AUTHORITY}.pem", path / f"{name}.pem", path / f"{name}.key")
    signer = load_pem_private_key((path / f"{_AUTHORITY}.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(made.authority.read_bytes())
    key = _write_key(made.key)
    serves = name == SERVER
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]  # a standby asks its primary
    if serves:
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    request = (
        _begin(name, issuer.subject, key, days)
        .add_extension(x509.BasicConstraints(False, None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=True)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
    )
    if serves:
        named = x509.SubjectAlternativeName([x509.DNSName(SERVER_NAME)])
        request = request.add_extension(named, critical=False)
    signed = request.sign(signer, hashes.SHA256())
    made.certificate.write_bytes(signed.public_bytes(Encoding.PEM))
    return made


def _make_authority(path: Path, days: int) -> None:
    key = _write_key(path / f"{_AUTHORITY}.key")
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lightning-easgd authority")])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    signed = (
        _begin("lightning-easgd authority", name, key, days)
        .add_extension(x509.BasicConstraints(True, 0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    (path / f"{_AUTHORITY}.pem").write_bytes(signed.public_bytes(Encoding.PEM))


def _begin(
    name: str, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # clocks of other machines may be behind
        .not_valid_after(now + timedelta(days=days))
    )


def _write_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = ec.generate_private_key(ec.SECP256R1())
    text = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
    return key
