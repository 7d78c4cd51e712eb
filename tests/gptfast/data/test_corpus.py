import hashlib
import socketserver
import threading
from pathlib import Path

import pytest

from gptfast.data import corpus
from tests.support.files import no_space


def test_load_text_of_the_standard_library_is_stable_ascii():
    text = corpus.load_text("stdlib")
    assert len(text) > 3_000_000
    assert text.isascii()
    assert "def dataclass(" in text
    assert "\r" not in text
    assert corpus.load_text("stdlib") == text


def test_load_text_prefers_built_in_texts(tmp_path, monkeypatch):
    """Even beside a file of that name."""
    monkeypatch.chdir(tmp_path)
    Path("clinic").write_text("another text")
    found = {name: corpus.load_text(name) for name in corpus.NAMES[2:]}
    assert list(found) == ["chatbot", "clinic", "sentences"]
    starts = ["Hello, how are you today? I am a chatbot", "The patient came to the clinic", "The quick brown fox"]
    assert [text[: len(start)] for text, start in zip(found.values(), starts, strict=True)] == starts
    assert all(text.isascii() and text.endswith(".\n") for text in found.values())


def test_load_text_reads_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_text("zwei")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("eins é")
    (tmp_path / ".hidden").write_text("no")
    assert corpus.load_text(str(tmp_path / "b.txt")) == "zwei"
    assert corpus.load_text(str(tmp_path)) == "eins é\nzwei"


def test_load_text_rejects_bad_sources(tmp_path):
    names = "stdlib, shakespeare, chatbot, clinic, sentences"
    with pytest.raises(ValueError, match=rf"no such data: 'nowhere.txt'; accepted: {names}, or a text file or folder"):
        corpus.load_text("nowhere.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty.txt is empty"):
        corpus.load_text(str(tmp_path / "empty.txt"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder is empty"):
        corpus.load_text(str(tmp_path / "folder"))
    (tmp_path / "image.bin").write_bytes(b"text \xff\xfe")
    with pytest.raises(ValueError, match=r"image.bin is not UTF-8 text: invalid start byte at byte 5"):
        corpus.load_text(str(tmp_path / "image.bin"))


@pytest.fixture
def shakespeare(monkeypatch, tmp_path) -> Path:
    """A stand-in for the download, as a file: URL with its checksum, and an empty cache."""
    source = tmp_path / "input.txt"
    source.write_bytes(b"First Citizen:\n")
    monkeypatch.setattr(corpus, "SHAKESPEARE_URL", source.as_uri())
    monkeypatch.setattr(corpus, "SHAKESPEARE_SHA256", hashlib.sha256(source.read_bytes()).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return source


def test_shakespeare_is_downloaded_once(shakespeare):
    assert corpus.load_text("shakespeare") == "First Citizen:\n"
    shakespeare.unlink()
    assert corpus.load_text("shakespeare") == "First Citizen:\n"


def test_shakespeare_replaces_a_damaged_cache(shakespeare, tmp_path):
    corpus.load_text("shakespeare")
    cached = tmp_path / "cache/gptfast/tinyshakespeare.txt"
    cached.write_text("First Cit")
    assert corpus.load_text("shakespeare") == "First Citizen:\n"
    assert cached.read_text() == "First Citizen:\n"


def test_shakespeare_offline_names_the_way_out(shakespeare):
    shakespeare.unlink()
    with pytest.raises(ValueError, match=r"Tiny Shakespeare could not be downloaded from .* --data FILE"):
        corpus.load_text("shakespeare")


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nFirst Cit", b"220 mail.example\r\n"],
    ids=["cut", "mail"],
)
def test_shakespeare_of_a_broken_answer_leaves_nothing(shakespeare, tmp_path, monkeypatch, answer):
    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(4096)
            self.request.sendall(answer)

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(corpus, "SHAKESPEARE_URL", f"http://127.0.0.1:{server.server_address[1]}/input.txt")
        with pytest.raises(ValueError, match=r"Tiny Shakespeare could not be downloaded from .* --data FILE") as caught:
            corpus.load_text("shakespeare")
        thread.join()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_shakespeare_on_a_full_disk_leaves_nothing(shakespeare, tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", no_space)
    with pytest.raises(ValueError, match=r"cannot write the download to .*No space left on device.*XDG_CACHE_HOME"):
        corpus.load_text("shakespeare")
    assert list((tmp_path / "cache/gptfast").iterdir()) == []


def test_shakespeare_rejects_another_checksum(shakespeare, tmp_path):
    shakespeare.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="another checksum"):
        corpus.load_text("shakespeare")
    assert not (tmp_path / "cache").exists()


def test_shakespeare_checksum_is_the_files():
    path = Path(__file__).parents[4] / "shared/data/tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("Tiny Shakespeare is not beside this checkout")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == corpus.SHAKESPEARE_SHA256
