"""Sending a message over SMTP: settings from the environment, TLS unless it is turned off."""

from __future__ import annotations

import os
import smtplib
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.headerregistry import Address
from email.message import EmailMessage
from email.utils import getaddresses

PREFIX = "STIEFEL_SMTP_"
TIMEOUT = 30.0
"""Seconds that the server may take for each answer."""
_TLS = ("starttls", "implicit", "off")


class SettingsError(ValueError):
    """A setting of the environment is missing or wrong; the message names it."""


class DeliveryError(RuntimeError):
    """The message was not sent, or not to all; the message says what the server said."""


@dataclass(frozen=True)
class Settings:
    """Where and how messages are sent. See :func:`read_settings`."""

    host: str
    port: int
    tls: str
    """``starttls``, ``implicit`` or ``off``."""
    sender: Address
    receivers: tuple[Address, ...]
    user: str | None = None
    password: str | None = field(default=None, repr=False)


def read_settings(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings for sending.

    ``STIEFEL_SMTP_HOST``, ``_FROM`` and ``_TO`` (several receivers joined by commas) are needed.
    ``_TLS`` is ``starttls`` (default; port 587), ``implicit`` (default on port 465) or ``off``
    (port 25). ``_PORT`` is another port. ``_USER`` and ``_PASSWORD`` go together and need TLS.

    Args:
        environment: In place of :data:`os.environ`.

    Raises:
        SettingsError: a setting is missing or wrong, or a password would go over the wire in clear.
    """
    given = os.environ if environment is None else environment
    values = {
        name: given.get(PREFIX + name, "").strip()
        for name in ("HOST", "PORT", "TLS", "USER", "FROM", "TO")
    }
    password = given.get(PREFIX + "PASSWORD", "")
    missing = [PREFIX + name for name in ("HOST", "FROM", "TO") if not values[name]]
    if missing:
        raise SettingsError(f"to send, the environment must have {', '.join(missing)}")
    host = values["HOST"]
    if not host.isascii() or not host.isprintable() or set(host) & set(" /@"):
        raise SettingsError(f"{PREFIX}HOST must be a host's name or address, got {host!r}")
    tls = values["TLS"].lower() or ("implicit" if values["PORT"] == "465" else "starttls")
    if tls not in _TLS:
        raise SettingsError(f"{PREFIX}TLS must be one of {', '.join(_TLS)}, got {values['TLS']!r}")
    port = _port(values["PORT"]) or {"starttls": 587, "implicit": 465, "off": 25}[tls]
    if bool(values["USER"]) != bool(password):
        raise SettingsError(f"{PREFIX}USER and {PREFIX}PASSWORD go together, got only one of them")
    if password and tls == "off":
        raise SettingsError(
            f"{PREFIX}TLS=off would send the password in the clear; "
            f"want {PREFIX}TLS=starttls or implicit, or neither user nor password"
        )
    if not (password.isascii() and password.isprintable()):
        raise SettingsError(f"{PREFIX}PASSWORD must be printable ASCII, as SMTP's logins are")
    return Settings(
        host=host,
        port=port,
        tls=tls,
        sender=sender_of(given),
        receivers=receivers_of(given),
        user=values["USER"] or None,
        password=password or None,
    )


def sender_of(environment: Mapping[str, str]) -> Address:
    """The one address in ``STIEFEL_SMTP_FROM``, such as ``Name <name@example.org>``.

    Raises:
        SettingsError: it is not one address.
    """
    addresses = _addresses(PREFIX + "FROM", environment.get(PREFIX + "FROM", ""))
    if len(addresses) != 1:
        raise SettingsError(f"{PREFIX}FROM must be one address, got {len(addresses)}")
    return addresses[0]


def receivers_of(environment: Mapping[str, str]) -> tuple[Address, ...]:
    """The addresses in ``STIEFEL_SMTP_TO``, joined by commas.

    Raises:
        SettingsError: something in it is not an address.
    """
    return _addresses(PREFIX + "TO", environment.get(PREFIX + "TO", ""))


def send(mail: EmailMessage, settings: Settings, *, timeout: float = TIMEOUT) -> None:
    """Send ``mail`` to the receivers of ``settings``.

    With TLS the server's certificate must be valid for its host by the system's authorities, or by
    those in the file that ``SSL_CERT_FILE`` names; a server that offers no TLS gets nothing.

    Args:
        mail: The message.
        settings: Where and how.
        timeout: Seconds that the server may take for each answer.

    Raises:
        DeliveryError: it was not sent, or not to all receivers.
    """
    place = f"{settings.host}:{settings.port}"
    try:
        with _connection(settings, timeout) as server:
            if settings.tls == "starttls":
                server.starttls(context=ssl.create_default_context())
            if settings.user is not None and settings.password is not None:
                server.login(settings.user, settings.password)
            refused = server.send_message(
                mail,
                from_addr=settings.sender.addr_spec,
                to_addrs=[address.addr_spec for address in settings.receivers],
            )
    except smtplib.SMTPRecipientsRefused as error:
        raise DeliveryError(
            f"{place} refused every receiver: {_refused(error.recipients)}"
        ) from None
    except smtplib.SMTPAuthenticationError as error:
        raise DeliveryError(f"{place} refused user and password: {_answer(error)}") from None
    except smtplib.SMTPResponseException as error:
        raise DeliveryError(f"{place} refused: {_answer(error)}") from error
    except ssl.SSLCertVerificationError as error:
        raise DeliveryError(
            f"the certificate of {place} is not to be trusted: {error.verify_message}"
        ) from error
    except (smtplib.SMTPException, OSError) as error:
        if isinstance(error, TimeoutError) or isinstance(error.__context__, TimeoutError):
            raise DeliveryError(f"{place} did not answer within {timeout:g} s") from error
        raise DeliveryError(f"{place}: {_clean(str(error)) or type(error).__name__}") from error
    if refused:
        raise DeliveryError(f"{place} took the message, but not for {_refused(refused)}")


def _connection(settings: Settings, timeout: float) -> smtplib.SMTP:
    # The default greeting would look up, and tell, the name of this machine.
    own = "[127.0.0.1]"
    if settings.tls == "implicit":
        return smtplib.SMTP_SSL(
            settings.host,
            settings.port,
            local_hostname=own,
            timeout=timeout,
            context=ssl.create_default_context(),
        )
    return smtplib.SMTP(settings.host, settings.port, local_hostname=own, timeout=timeout)


def _port(text: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise SettingsError(f"{PREFIX}PORT must be a number from 1 to 65535, got {text!r}")
    return int(text)


def _addresses(name: str, text: str) -> tuple[Address, ...]:
    """Each address in ``text``. Line ends and other control characters never reach a header."""
    if not text.isprintable():
        raise SettingsError(f"{name} must have no line ends or control characters, got {text!r}")
    if not text.strip():
        return ()
    found = []
    for display, address in getaddresses([text]):
        local, _, domain = address.rpartition("@")
        try:
            if not (local and domain and address.isascii()):
                raise ValueError("an address in ASCII with a name before and a host after its @")
            parsed = Address(display, addr_spec=address)
        except (ValueError, IndexError) as error:
            raise SettingsError(
                f"{name} must have addresses such as Name <name@example.org>, joined by commas; "
                f"got {text!r}: {error}"
            ) from error
        found.append(parsed)
    return tuple(found)


def _answer(error: smtplib.SMTPResponseException) -> str:
    said = error.smtp_error
    words = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    return f"{error.smtp_code} {_clean(words)}"


def _refused(answers: Mapping[str, tuple[int, bytes]]) -> str:
    return "; ".join(
        f"{receiver} ({code} {_clean(said.decode('utf-8', 'replace'))})"
        for receiver, (code, said) in answers.items()
    )


def _clean(text: str) -> str:
    """A server's words on one line, without what could move a terminal's cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:300]
