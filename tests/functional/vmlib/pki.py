# SPDX-License-Identifier: Apache-2.0
"""Certificates and keys for tests of TLS on NBD, made with the openssl program in the layout of QEMU and libnbd."""

import os
import secrets
import subprocess
from pathlib import Path


def _openssl(*arguments) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"openssl {arguments}: {done.stderr}")


class Authority:
    """A certificate authority of its own; EC keys, which are made in no time."""

    def __init__(self, folder, name: str = "vmferry test CA"):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.key, self.certificate = self.folder / "ca-key.pem", self.folder / "ca-cert.pem"
        self._new_key(self.key)
        _openssl("req", "-x509", "-new", "-key", self.key, "-out", self.certificate, "-subj", f"/CN={name}", "-days", 2,
                 "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        self._serial = 1

    @staticmethod
    def _new_key(path: Path) -> None:
        _openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", path)
        os.chmod(path, 0o600)

    def _issue(self, folder: Path, kind: str, name: str, extensions: str, expired: bool) -> None:
        self._serial += 1
        key, request, made = folder / f"{kind}-key.pem", folder / f"{kind}.csr", folder / f"{kind}-cert.pem"
        self._new_key(key)
        _openssl("req", "-new", "-key", key, "-out", request, "-subj", f"/CN={name}")
        text = folder / f"{kind}.ext"
        text.write_text(f"basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature,keyEncipherment\n{extensions}\n")
        if expired:  # `openssl x509 -req` cannot choose dates; `openssl ca` can
            database = folder / f"{kind}.db"
            database.write_text("")
            config = folder / f"{kind}.cnf"
            config.write_text(f"[ca]\ndefault_ca=x\n[x]\ndatabase={database}\nnew_certs_dir={folder}\ndefault_md=sha256\n"
                              f"policy=p\nrand_serial=yes\n[p]\ncommonName=supplied\n")
            _openssl("ca", "-batch", "-notext", "-config", config, "-cert", self.certificate, "-keyfile", self.key,
                     "-in", request, "-out", made, "-extfile", text, "-startdate", "20200101000000Z",
                     "-enddate", "20200102000000Z")
        else:
            _openssl("x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-out", made,
                     "-days", 2, "-set_serial", self._serial, "-extfile", text)

    def _folder(self, folder) -> Path:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "ca-cert.pem").write_bytes(self.certificate.read_bytes())
        return path

    def server(self, folder, expired: bool = False) -> Path:
        path = self._folder(folder)
        self._issue(path, "server", "server", "extendedKeyUsage=serverAuth\n"
                    "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1", expired)
        return path

    def client(self, folder, name: str, expired: bool = False, purpose: str = "clientAuth") -> Path:
        path = self._folder(folder)
        self._issue(path, "client", name, f"extendedKeyUsage={purpose}", expired)
        return path

    def revoke(self, folder, certificate) -> None:
        """Writes ca-crl.pem with this certificate into the folder."""
        work = Path(folder)
        database, config = work / "crl.db", work / "crl.cnf"
        database.write_text("")
        (work / "crlnumber").write_text("01\n")
        config.write_text(f"[ca]\ndefault_ca=x\n[x]\ndatabase={database}\ncrlnumber={work}/crlnumber\ndefault_md=sha256\n"
                          f"default_crl_days=2\n")
        common = ("-config", config, "-cert", self.certificate, "-keyfile", self.key)
        _openssl("ca", *common, "-revoke", certificate)
        _openssl("ca", *common, "-gencrl", "-out", work / "ca-crl.pem")


def psk_file(path, *users: str) -> Path:
    """A file as psktool writes it: USER:HEXKEY."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{user}:{secrets.token_hex(32)}\n" for user in users))
    os.chmod(file, 0o600)
    return file
