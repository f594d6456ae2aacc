"""The digest: what counts as news, a message that is whole and safe, and a real server for it."""

import json
import os
import re
import socket
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from html.parser import HTMLParser

import fake_papers as fakes
import pytest
import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from test_page import HOSTILE, hostile
from test_result import record
from typer.testing import CliRunner

from stiefel.atlas.digest import collect, html, message, text
from stiefel.atlas.mail import (
    PREFIX,
    DeliveryError,
    Settings,
    SettingsError,
    read_settings,
    receivers_of,
    send,
    sender_of,
)
from stiefel.cli import app
from stiefel.papers import Scale

JANUARY, FEBRUARY, MARCH = (f"2026-0{month}-10T12:00:00.000+00:00" for month in (1, 2, 3))
SINCE = datetime(2026, 2, 1, tzinfo=UTC)
GIVEN = {
    PREFIX + "HOST": "mail.example.org",
    PREFIX + "FROM": "Stiefel <digest@example.org>",
    PREFIX + "TO": "Ann <ann@example.org>, bob@example.org",
}
waiting = fakes.make("waiting", fakes.quick_experiment)
other = fakes.make("other", fakes.quick_experiment)
PAPERS = (fakes.quick, hostile, waiting, other)


def measure(folder, values, started, *, paper=fakes.quick, **changes):
    for seed, value in enumerate(values):
        record(seed, {"ratio": value}, paper=paper, started=started, **changes).save(folder)


def news(folder, since=SINCE, papers=(fakes.quick,)):
    return [
        (i.entry.paper.slug, i.kind, i.verdict_before, i.entry.verdict)
        for i in collect(folder, papers, since).items
    ]


# What is news


def test_a_first_measurement_after_the_date_is_new(tmp_path):
    measure(tmp_path, [0.5, 0.6, 0.7], MARCH)
    assert news(tmp_path) == [("quick", "new", None, "reproduced")]
    assert news(tmp_path, datetime(2026, 3, 11, tzinfo=UTC)) == []


def test_the_date_itself_belongs_to_the_news(tmp_path):
    measure(tmp_path, [0.5], MARCH)
    at = datetime.fromisoformat(MARCH)
    assert len(news(tmp_path, at)) == 1
    assert news(tmp_path, at + timedelta(seconds=1)) == []


def test_other_numbers_are_a_change_and_the_same_are_not(tmp_path):
    measure(tmp_path, [0.8, 1.0, 1.2], JANUARY)
    measure(tmp_path, [0.8, 1.0, 1.2], FEBRUARY, code="new")
    assert news(tmp_path) == []
    measure(tmp_path, [0.5, 0.6, 0.7], MARCH)
    assert news(tmp_path) == [("quick", "changed", "inconclusive", "reproduced")]
    # Compared with the state at the date, not with the last run.
    measure(tmp_path, [0.8, 1.0, 1.2], "2026-03-20T00:00:00+00:00")
    assert news(tmp_path) == []
    assert news(tmp_path, datetime(2026, 3, 15, tzinfo=UTC)) == [
        ("quick", "changed", "reproduced", "inconclusive")
    ]


def test_nan_is_the_same_as_nan(tmp_path):
    measure(tmp_path, [float("nan")] * 2, JANUARY)
    measure(tmp_path, [float("nan")] * 2, MARCH, code="new")
    assert news(tmp_path) == []


def test_at_the_date_only_the_newest_code_counts(tmp_path):
    """Seeds 0 and 1 were run again before the date, seed 2 was not."""
    measure(tmp_path, [0.1, 0.2, 5.0], "2026-01-01T00:00:00+00:00", code="old")
    measure(tmp_path, [0.5, 0.6], JANUARY)
    measure(tmp_path, [0.5, 0.6, 0.7], MARCH)
    (item,) = collect(tmp_path, [fakes.quick], SINCE).items
    assert item.before[0].value == pytest.approx(0.55)


def test_a_larger_scale_is_a_change_too(tmp_path):
    measure(tmp_path, [0.5, 0.6, 0.7], JANUARY, scale=Scale.SMOKE)
    measure(tmp_path, [0.5, 0.6, 0.7], MARCH)
    assert news(tmp_path) == [("quick", "changed", "inconclusive", "reproduced")]


def test_more_runs_than_the_history_keeps_are_still_a_change(tmp_path):
    measure(tmp_path, [0.8, 1.0, 1.2], JANUARY)
    for day in range(10, 18):
        measure(tmp_path, [0.1 * day / 10] * 3, f"2026-03-{day}T00:00:00+00:00")
    assert [kind for _, kind, *_ in news(tmp_path)] == ["changed"]


def test_a_crash_is_news_once(tmp_path):
    measure(tmp_path, [0.5, 0.6, 0.7], JANUARY)
    error = tmp_path / "quick/laptop/1.error.txt"
    error.write_text("Traceback\nValueError: a < b\n")
    at = datetime(2026, 3, 1, tzinfo=UTC).timestamp()
    os.utime(error, (at, at))
    assert news(tmp_path) == [("quick", "changed", "reproduced", "failed")]
    assert news(tmp_path, datetime(2026, 3, 2, tzinfo=UTC)) == []
    assert "Seed 1: ValueError: a < b" in text(collect(tmp_path, [fakes.quick], SINCE))


def test_turned_verdicts_come_first_then_new_cards_then_new_numbers(tmp_path):
    measure(tmp_path, [0.5, 0.6, 0.7], JANUARY)
    measure(tmp_path, [0.5, 0.6, 0.71], MARCH)
    measure(tmp_path, [0.5, 0.6, 0.7], MARCH, paper=waiting)
    measure(tmp_path, [0.5, 0.6, 0.7], JANUARY, paper=other)
    measure(tmp_path, [1.5, 1.6, 1.7], MARCH, paper=other)
    digest = collect(tmp_path, PAPERS, SINCE)
    assert [i.entry.paper.slug for i in digest.items] == ["other", "waiting", "quick"]
    assert digest.subject == "Stiefel: 1 new, 2 changed since 2026-02-01"


def test_a_date_without_time_zone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="time zone"):
        collect(tmp_path, PAPERS, datetime(2026, 1, 1))


# The message


@pytest.fixture
def digest(tmp_path):
    measure(tmp_path, [0.8, 1.0, 1.2], JANUARY)
    measure(tmp_path, [0.5, 0.6, 0.7], MARCH)
    measure(tmp_path, [0.5, 0.6, 0.7], MARCH, paper=hostile)
    return collect(tmp_path, PAPERS, SINCE)


class Reader(HTMLParser):
    def __init__(self, markup):
        super().__init__()
        self.tags, self.links, self.words = [], [], []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("href", "src")]

    def handle_data(self, data):
        self.words.append(data)


def test_the_message_is_text_and_html_that_say_the_same(digest):
    mail = message(digest, page_url="https://example.org/atlas/", now=SINCE)
    again = message_from_bytes(mail.as_bytes(), policy=policy.default)
    assert again.get_content_type() == "multipart/alternative"
    plain, rich = again.iter_parts()
    assert [plain.get_content_type(), rich.get_content_type()] == ["text/plain", "text/html"]
    reader = Reader(rich.get_content())
    said = " ".join(" ".join(reader.words).split())
    for part in (
        *("inconclusive → reproduced: The quick paper", "the ratio stays small", HOSTILE),
        *("reproduced: 0.6 (0.3516 to 0.8484), claimed ≤ 0.9", "New, not reproduced"),
        "(before: inconclusive, 1 (0.5032 to 1.497))",
        "stiefel reproduce quick --scale laptop --seeds 0,1,2",
    ):
        assert part in said, part
        assert part in " ".join(plain.get_content().split()), part
    assert reader.links == [
        "https://example.org/atlas/papers/quick.html",
        "https://arxiv.org/abs/2503.00001",
        "https://example.org/atlas/papers/hostile.html",
        "https://arxiv.org/abs/2503.00001",
    ]
    assert not {"script", "img", "link", "iframe", "style"} & set(reader.tags)
    assert again["Subject"] == "Stiefel: 1 new, 1 changed since 2026-02-01"
    assert again["Date"].datetime == SINCE
    assert again["From"] == "Stiefel <digest@stiefel.invalid>"
    assert again["X-Unsent"] == "1"
    assert again["To"] is None
    assert socket.gethostname() not in again["Message-ID"]
    assert max(map(len, mail.as_bytes().split(b"\r\n"))) <= 998  # RFC 5322, 2.1.1


def test_nothing_new_is_said_in_words(tmp_path):
    empty = collect(tmp_path, PAPERS, SINCE)
    assert empty.subject == "Stiefel: nothing new since 2026-02-01"
    assert "none has changed" in text(empty)
    assert "none has changed" in html(empty)


def test_a_title_with_line_ends_makes_no_header_and_no_line(tmp_path):
    evil = fakes.make(
        "evil",
        fakes.quick_experiment,
        title="One\r\nBcc: all@example.org\r\n\r\nTwo\x1b[2J",
        summary="A\nB",
    )
    measure(tmp_path, [0.5], MARCH, paper=evil)
    mail = message(collect(tmp_path, [evil], SINCE))
    again = message_from_bytes(mail.as_bytes(), policy=policy.default)
    assert again["Bcc"] is None
    assert "New, inconclusive: One Bcc: all@example.org Two [2J\n" in text(
        collect(tmp_path, [evil], SINCE)
    )


# Settings


def test_settings_and_their_defaults():
    got = read_settings(GIVEN)
    assert (got.host, got.port, got.tls) == ("mail.example.org", 587, "starttls")
    assert got.user is got.password is None
    assert str(got.sender) == "Stiefel <digest@example.org>"
    assert [a.addr_spec for a in got.receivers] == ["ann@example.org", "bob@example.org"]
    for more, want in (
        ({"PORT": "465"}, (465, "implicit")),
        ({"TLS": "implicit"}, (465, "implicit")),
        ({"TLS": "off"}, (25, "off")),
        ({"PORT": "2525"}, (2525, "starttls")),
        ({"PORT": "465", "TLS": "STARTTLS"}, (465, "starttls")),
    ):
        got = read_settings(GIVEN | {PREFIX + k: v for k, v in more.items()})
        assert (got.port, got.tls) == want


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"HOST": ""}, "STIEFEL_SMTP_HOST"),
        ({"FROM": "", "TO": " "}, "STIEFEL_SMTP_FROM, STIEFEL_SMTP_TO"),
        ({"HOST": "a b"}, "HOST must be a host"),
        ({"HOST": "a\r\nQUIT"}, "HOST must be a host"),
        ({"PORT": "0"}, "PORT must be a number from 1 to 65535, got '0'"),
        ({"PORT": "65536"}, "PORT must be"),
        ({"PORT": "smtp"}, "PORT must be"),
        ({"TLS": "maybe"}, "TLS must be one of starttls, implicit, off, got 'maybe'"),
        ({"USER": "u"}, "go together"),
        ({"PASSWORD": "hush"}, "go together"),
        ({"USER": "u", "PASSWORD": "hush", "TLS": "off"}, "in the clear"),
        ({"USER": "u", "PASSWORD": "hüsh"}, "printable ASCII"),
        ({"FROM": "a@example.org, b@example.org"}, "FROM must be one address, got 2"),
        ({"FROM": "a@example.org\r\nBcc: b@example.org"}, "no line ends"),
        ({"TO": "a@example.org\nSubject: x"}, "no line ends"),
        ({"TO": "nobody"}, "must have addresses such as"),
        ({"TO": "a@b@c, d@example.org"}, "must have addresses such as"),
        ({"TO": "a@example.org,,b@example.org"}, "must have addresses such as"),
        ({"TO": "ü@example.org"}, "must have addresses such as"),
        ({"TO": "@example.org"}, "must have addresses such as"),
    ],
)
def test_bad_settings_are_named(changes, words):
    with pytest.raises(SettingsError) as caught:
        read_settings(GIVEN | {PREFIX + k: v for k, v in changes.items()})
    assert words in str(caught.value)
    assert "hush" not in str(caught.value)


def test_the_password_is_not_shown():
    given = GIVEN | {PREFIX + "USER": "u", PREFIX + "PASSWORD": "hush"}
    assert "hush" not in repr(read_settings(given))


def test_addresses_with_commas_and_quotes():
    given = {PREFIX + "TO": '"Doe, Jane" <jane@example.org>', PREFIX + "FROM": "x@example.org"}
    (jane,) = receivers_of(given)
    assert (jane.display_name, jane.addr_spec) == ("Doe, Jane", "jane@example.org")
    assert sender_of(given).display_name == ""
    assert receivers_of({}) == ()


# Sending, over a real server


def over_tls(server):
    return server.transport.get_extra_info("ssl_object") is not None


class Box:
    """What arrived, and whether it came through TLS."""

    def __init__(self):
        self.mails, self.tls, self.logins, self.greetings = [], [], [], []

    async def handle_EHLO(self, server, session, envelope, hostname, responses):
        self.greetings.append(hostname)
        session.host_name = hostname
        return responses

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address.startswith("unknown"):
            return "550 No \x1b[31msuch user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server, session, envelope):
        self.mails.append((envelope.rcpt_tos, message_from_bytes(
            envelope.content, policy=policy.default
        )))  # fmt: skip
        self.tls.append(over_tls(server))
        return "250 OK"

    def login(self, server, session, envelope, mechanism, data):
        self.logins.append((data.login.decode(), data.password.decode(), over_tls(server)))
        return AuthResult(success=data.password == b"hush", handled=False)


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def server_context(authority):
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


@pytest.fixture
def trusted(authority, tmp_path, monkeypatch):
    """The authority of the tests among those of the system."""
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(path)
    monkeypatch.setenv("SSL_CERT_FILE", str(path))


@pytest.fixture
def post(server_context):
    """Starts servers: ``post(tls)`` gives the box and the settings for it."""
    running = []

    def start(tls, *, login=False, **settings):
        box = Box()
        options = {
            "starttls": {"tls_context": server_context, "require_starttls": True},
            "implicit": {"ssl_context": server_context, "auth_require_tls": False},
            "off": {},
            "none offered": {},
        }[tls]
        if login:
            options |= {"authenticator": box.login, "auth_required": tls != "implicit"}
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        controller = Controller(box, hostname="127.0.0.1", port=port, **options)
        controller.start()
        running.append(controller)
        given = GIVEN | {
            PREFIX + "HOST": "127.0.0.1",
            PREFIX + "PORT": str(port),
            PREFIX + "TLS": tls if tls != "none offered" else "starttls",
            **{PREFIX + name: value for name, value in settings.items()},
        }
        if login:
            given = {PREFIX + "USER": "me", PREFIX + "PASSWORD": "hush"} | given
        return box, given

    yield start
    for controller in running:
        controller.stop()


@pytest.mark.parametrize("tls", ["starttls", "implicit", "off"])
def test_a_message_arrives(digest, post, trusted, tls):
    box, given = post(tls)
    settings = read_settings(given)
    mail = message(digest, sender=settings.sender, receivers=settings.receivers)
    send(mail, settings)
    ((receivers, got),) = box.mails
    assert receivers == ["ann@example.org", "bob@example.org"]
    assert got["To"] == "Ann <ann@example.org>, bob@example.org"
    assert got["X-Unsent"] is None
    assert got["Message-ID"].endswith("@example.org>")
    said = [part.get_content().replace("\r\n", "\n") for part in got.iter_parts()]
    assert said == [part.get_content() for part in mail.iter_parts()]
    assert "≤ 0.9" in got.get_body(("plain",)).get_content()
    assert box.tls == [tls != "off"]
    assert set(box.greetings) == {"[127.0.0.1]"}  # not this machine's name


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_the_password_goes_through_tls(digest, post, trusted, tls):
    box, given = post(tls, login=True)
    send(message(digest), read_settings(given))
    assert box.logins == [("me", "hush", True)]
    assert len(box.mails) == 1


def refusal(digest, given, **options):
    with pytest.raises(DeliveryError) as caught:
        send(message(digest), read_settings(given), **options)
    assert "hush" not in str(caught.value)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_wrong_password_is_a_sentence(digest, post, trusted):
    box, given = post("starttls", login=True, PASSWORD="hush-hush")  # noqa: S106
    assert "refused user and password: 535" in refusal(digest, given)
    assert box.mails == []


def test_a_server_without_tls_gets_no_password_and_no_mail(digest, post, trusted):
    box, given = post("none offered", USER="me", PASSWORD="hush")  # noqa: S106
    assert "STARTTLS" in refusal(digest, given)
    assert box.mails == box.logins == []


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_an_unknown_certificate_is_refused(digest, post, tls):
    box, given = post(tls, login=True)
    assert "is not to be trusted: " in refusal(digest, given)
    assert box.mails == box.logins == []


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_a_certificate_of_another_name_is_refused(digest, post, trusted, tls):
    box, given = post(tls, login=True, HOST="localhost")
    assert "is not to be trusted: " in refusal(digest, given)
    assert box.mails == box.logins == []


def test_refused_receivers_are_named(digest, post, trusted):
    box, given = post("starttls", TO="unknown@example.org")
    assert "refused every receiver: unknown@example.org (550 No [31msuch user)" in refusal(
        digest, given
    )
    assert box.mails == []
    box, given = post("starttls", TO="ann@example.org, unknown@example.org")
    assert "took the message, but not for unknown@example.org (550" in refusal(digest, given)
    assert [receivers for receivers, _ in box.mails] == [["ann@example.org"]]


def test_a_silent_server_costs_the_timeout(digest):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        given = GIVEN | {
            PREFIX + "HOST": "127.0.0.1",
            PREFIX + "PORT": str(silent.getsockname()[1]),
        }
        start = time.monotonic()
        assert "did not answer within 0.3 s" in refusal(digest, given, timeout=0.3)
        assert time.monotonic() - start < 5


def test_a_server_that_speaks_something_else(digest):
    with socket.create_server(("127.0.0.1", 0)) as odd:

        def answer():
            with odd.accept()[0] as connection:
                connection.sendall(b"554 go \x1b[2Jaway\r\n")

        threading.Thread(target=answer, daemon=True).start()
        given = GIVEN | {PREFIX + "HOST": "127.0.0.1", PREFIX + "PORT": str(odd.getsockname()[1])}
        assert "refused: 554 go [2Jaway" in refusal(digest, given)
    assert "127.0.0.1" in refusal(digest, given)  # nobody there now


def test_settings_are_a_record():
    settings = read_settings(GIVEN)
    assert settings == Settings(
        "mail.example.org", 587, "starttls", settings.sender, settings.receivers
    )


# The command


@pytest.fixture
def command(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("stiefel.papers.all_papers", lambda: PAPERS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").mkdir()
    measure(tmp_path / "results", [0.5, 0.6, 0.7], MARCH)

    def call(*arguments, **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(app, ["digest", *map(str, arguments)])
        return result.exit_code, re.sub(r"\s+", " ", re.sub("[│╭╰─╮╯]", " ", result.output))

    return call


def test_command_prints_the_text(command):
    status, said = command("--since", "2026-02-01")
    assert status == 0
    assert "Stiefel: 1 new since 2026-02-01 New, reproduced: The quick paper" in said


def test_command_writes_a_draft(command, tmp_path):
    status, said = command("--since", "2026-02-01", "--out", "new/d.eml")
    assert (status, said) == (0, "Stiefel: 1 new since 2026-02-01 Message: new/d.eml ")
    mail = message_from_bytes((tmp_path / "new/d.eml").read_bytes(), policy=policy.default)
    assert mail["X-Unsent"] == "1"
    assert len(list(mail.iter_parts())) == 2


def test_command_tells_json(command):
    status, said = command("--since", "2026-02-01T08:00+01:00", "--json")
    assert status == 0
    got = json.loads(said)
    assert got["since"] == "2026-02-01T08:00:00+01:00"
    assert not got["sent"]
    assert [item["slug"] for item in got["items"]] == ["quick"]
    assert got["items"][0]["verdict_before"] is None


def test_command_sends(command, post, trusted):
    box, given = post("starttls", login=True)
    status, said = command("--since", "2026-02-01", "--send", **given)
    assert (status, said) == (0, "Stiefel: 1 new since 2026-02-01 Sent to 2 receivers. ")
    assert box.mails[0][1]["Subject"] == "Stiefel: 1 new since 2026-02-01"
    assert box.mails[0][1]["From"] == "Stiefel <digest@example.org>"
    status, said = command("--since", "2026-04-01", "--send")
    assert (status, said) == (0, "Stiefel: nothing new since 2026-04-01 Nothing sent. ")
    assert len(box.mails) == 1
    status, said = command("--since", "2026-02-01", "--send", **{PREFIX + "PASSWORD": "no"})
    assert status == 2
    assert "not sent: 127.0.0.1:" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--since", "yesterday"], "want a date such as 2026-11-01, got 'yesterday'"),
        (["--since", "2999-01-01"], "lies in the future"),
        (["--since", "2026-02-01", "--results", "nowhere"], "no folder nowhere"),
        (["--since", "2026-02-01", "--send"], "the environment must have STIEFEL_SMTP_HOST"),
        (["--since", "2026-02-01", "--page-url", "javascript:1"], "want an address such as"),
        (["--since", "2026-02-01", "--out", "results"], "cannot write"),
        ([], "--since"),
    ],
)
def test_bad_input_ends_with_2(command, arguments, words):
    status, said = command(*arguments)
    assert status == 2
    assert words in said
