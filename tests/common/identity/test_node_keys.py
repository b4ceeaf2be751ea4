"""What a federation on Flower gets besides identities: whole folders, two authorities, keys that fit."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
from cryptography.x509 import DNSName, SubjectAlternativeName, load_pem_x509_certificate

from tightbeam.common.errors import IdentityError
from tightbeam.common.identity.identities import load_identity
from tightbeam.common.identity.node_keys import init_federation, init_node_keys

CLIENTS = ("clinic", "lab")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    init_federation(tmp_path, clients=CLIENTS, cloud_hosts=["cloud"], fleet_hosts=["superlink", "fleet"])
    return tmp_path


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _names(certificate: Path) -> set[str]:
    parsed = load_pem_x509_certificate(certificate.read_bytes())
    found = parsed.extensions.get_extension_for_class(SubjectAlternativeName).value
    return set(found.get_values_for_type(DNSName))


def test_every_machine_has_its_folders(made: Path) -> None:
    assert sorted(path.name for path in made.iterdir()) == ["edges", "fleet", "nodes", "roster"]
    assert sorted(path.name for path in (made / "edges").iterdir()) == ["ca", "clinic", "cloud", "lab"]
    assert sorted(path.name for path in (made / "fleet").iterdir()) == ["ca", "cloud"]
    assert sorted(path.name for path in (made / "roster").iterdir()) == ["ca.crt", "clinic.pub", "lab.pub"]
    for name in CLIENTS:
        assert sorted(path.name for path in (made / "nodes" / name).iterdir()) == ["ca.crt", "node.key"]
        assert load_identity(made / "edges" / name).name == name


def test_the_public_key_is_of_the_private_one_on_a_curve_that_flower_takes(made: Path) -> None:
    numbers = set()
    for name in CLIENTS:
        private = load_ssh_private_key((made / "nodes" / name / "node.key").read_bytes(), None)
        public = load_ssh_public_key((made / "roster" / f"{name}.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert isinstance(public, ec.EllipticCurvePublicKey)
        assert private.public_key() == public
        assert public.curve.name == "secp384r1"
        numbers.add(public.public_numbers())
    assert len(numbers) == len(CLIENTS)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_private_keys_are_for_their_owner_only(made: Path) -> None:
    keys = [*made.rglob("*.key")]
    assert len(keys) == 2 + 2 * 4 + len(CLIENTS)  # authorities; cloud, SuperLink and clients; nodes
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_the_superlink_cannot_pose_as_the_cloud(made: Path) -> None:
    authorities = {(made / part / "ca" / "ca.crt").read_bytes() for part in ("edges", "fleet")}
    assert len(authorities) == 2
    trusted = [made / "roster" / "ca.crt", *(made / "nodes" / name / "ca.crt" for name in CLIENTS)]
    assert {path.read_bytes() for path in trusted} == {(made / "fleet" / "ca" / "ca.crt").read_bytes()}
    assert "cloud" not in _names(made / "fleet" / "cloud" / "tls.crt")
    assert _names(made / "fleet" / "cloud" / "tls.crt") >= {"superlink", "fleet", "localhost"}
    assert _names(made / "edges" / "cloud" / "tls.crt") >= {"cloud", "localhost"}


def test_what_is_there_is_kept_and_clients_can_be_added(made: Path) -> None:
    before = _contents(made)
    report = init_federation(made, clients=(*CLIENTS, "ward"))
    after = _contents(made)
    assert {name: after[name] for name in before} == before
    created = sorted(path.relative_to(made).as_posix() for path in report.created)
    assert created == ["edges/ward", "nodes/ward"]
    assert (made / "roster" / "ward.pub").is_file()


def test_a_lost_public_key_comes_back(made: Path) -> None:
    public = made / "roster" / "lab.pub"
    before = public.read_bytes()
    public.unlink()
    assert init_node_keys(made, CLIENTS).created == ()
    assert public.read_bytes() == before


@pytest.mark.parametrize("content", [b"no key", b""])
def test_a_spoilt_key_is_named_with_its_cure(made: Path, content: bytes) -> None:
    key = made / "nodes" / "lab" / "node.key"
    key.write_bytes(content)
    with pytest.raises(IdentityError, match=r"lab.node\.key cannot be read.*Remove it"):
        init_node_keys(made, CLIENTS)


def test_a_key_of_another_kind_is_named(made: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    other = Ed25519PrivateKey.generate()
    pem = other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (made / "nodes" / "lab" / "node.key").write_bytes(pem)
    with pytest.raises(IdentityError, match="of another kind"):
        init_node_keys(made, CLIENTS)


def test_a_name_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="cannot be the name of a client"):
        init_node_keys(tmp_path, ["../elsewhere"])
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_what_it_made(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tightbeam.cli", "certs", "federation", "made", "--client", "lab"]
    first, again = (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True) for _ in range(2)
    )
    made = ["edges/ca", "edges/cloud", "edges/lab", "fleet/ca", "fleet/cloud", "nodes/lab"]
    assert first.stdout.split() == [str(Path("made") / path) for path in made]
    assert again.stdout == ""
    assert again.stderr.count("which was there") == len(made)
