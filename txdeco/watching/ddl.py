"""The commands that install and remove the trigger, and the names of what they make.

A notification is a hint: the channel of the table, and a hash of the row's key. The row itself is read again. Writers
send one only while somebody waits: waiters keep a lease on the table, the time until which they want to hear, as the
value of a sequence. A sequence is seen by everybody at once, whatever transaction they are in. NOTIFY makes commits
queue up behind each other (https://www.postgresql.org/docs/current/sql-notify.html), so this is what keeps it from the
writers nobody waits for.

Writers parse the WHEN of a trigger anew for each statement, so it asks as little as can be asked of a sequence: whether
it has been called. It has not while there is a lease. A lease that nobody renews ends by itself: the first writer that
finds it over calls the sequence, and those after it are not disturbed until somebody waits again. A lock keeps that
writer and whoever begins to wait apart, for as long as two reads of the sequence take; the writer never waits for it.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from sqlalchemy import Table

TRIGGERS: Final = ("txdeco_watch", "txdeco_watch_truncate")
HINTS: Final = 32  # a transaction that changes more rows of a table sends one hint for the whole table after that

_DONE: Final = "TXDEC"  # an SQLSTATE of our own
_NOW: Final = "pg_catalog.date_part('epoch', pg_catalog.clock_timestamp())"

# Sets `sent` to -1 where the lease of the trigger that runs is over, and sees to it that writers are told so by WHEN.
_LOOK_FOR_LEASE: Final = f"""
                IF sent = 0 AND ends <= now THEN
                    WITH RECURSIVE mine AS (
                        SELECT oid, tgparentid FROM pg_catalog.pg_trigger WHERE tgrelid = TG_RELID AND tgname = TG_NAME
                        UNION ALL
                        SELECT t.oid, t.tgparentid FROM pg_catalog.pg_trigger t JOIN mine m ON t.oid = m.tgparentid
                    )
                    SELECT c.oid INTO lease
                        FROM mine
                        JOIN pg_catalog.pg_depend d ON d.objid = mine.oid
                            AND d.classid = 'pg_catalog.pg_trigger'::regclass
                            AND d.refclassid = 'pg_catalog.pg_class'::regclass
                        JOIN pg_catalog.pg_class c ON c.oid = d.refobjid
                        WHERE c.relkind = 'S' AND c.relname ~ '^txdeco_.*_lease$'
                            AND pg_catalog.has_schema_privilege(c.relnamespace, 'USAGE')
                            AND pg_catalog.has_sequence_privilege(c.oid, 'SELECT')
                            AND pg_catalog.has_sequence_privilege(c.oid, 'UPDATE');
                    IF lease IS NOT NULL THEN
                        look = 'SELECT last_value, is_called FROM ' || lease::text;
                        EXECUTE look INTO ends, is_called;
                        IF ends > now AND NOT is_called THEN
                            PERFORM pg_catalog.set_config(ends_name, ends::text, false);
                        ELSE
                            sent = -1;
                            PERFORM pg_catalog.set_config(sent_name, '-1', true);
                            IF NOT is_called THEN
                                BEGIN
                                    IF pg_catalog.pg_try_advisory_xact_lock(TG_ARGV[1]::bigint) THEN
                                        EXECUTE look INTO ends, is_called;
                                        IF ends <= now THEN
                                            PERFORM pg_catalog.setval(lease, 1);
                                        END IF;
                                    END IF;
                                    RAISE EXCEPTION USING ERRCODE = '{_DONE}';
                                EXCEPTION WHEN SQLSTATE '{_DONE}' THEN
                                END;
                            END IF;
                        END IF;
                    END IF;
                END IF;"""


class WatchDDL:
    """The names of one table's trigger, functions and sequence, and the commands that make them."""

    def __init__(self, table: Table, translation: Mapping[Any, Any]) -> None:
        schema = translation.get(table.schema, table.schema)
        self.table = _qualified(schema, table.name)
        mark = hashlib.sha256(self.table.encode()).digest()
        self.seed = int.from_bytes(mark[:8], "big", signed=True)
        self.channel = f"txdeco_{mark[:8].hex()}"
        stem = f"txdeco_{re.sub('[^a-z0-9_]', '_', table.name.lower())[:36]}_{mark[:4].hex()}"
        self.notify, self.awake, self.wake, self.lease = (
            _qualified(schema, f"{stem}_{each}") for each in ("notify", "awake", "wake", "lease")
        )
        self.lease_id = f"{_literal(_qualified(schema, f'{stem}_lease', _quoted))}::pg_catalog.regclass"

    def create(self, keys: list[str], columns: list[str] | None) -> list[str]:
        """Return the commands that install the watch.

        Who may not read the lease (grants get lost in a restore) is not to fail, nor to be missed: PostgreSQL says NULL
        to them from 18 on; older ones are asked. `UPDATE OF` costs those who write to other columns nothing; without
        *columns* the function compares the row.
        """
        row, truncate = TRIGGERS
        of = f" OF {', '.join(map(_escaped, dict.fromkeys([*keys, *columns])))}" if columns is not None else ""
        awake = f"pg_catalog.pg_sequence_last_value({self.lease_id}) IS NULL"
        may_not_read = f"NOT pg_catalog.has_sequence_privilege({self.lease_id}, 'SELECT')"

        def triggers(when: str) -> str:
            rest = f"WHEN ({when}) EXECUTE FUNCTION {self.notify}('{self.channel}', '{self.seed}')"
            return (
                f"CREATE OR REPLACE TRIGGER {row} AFTER UPDATE{of} OR DELETE ON {self.table} FOR EACH ROW {rest};"
                f"CREATE OR REPLACE TRIGGER {truncate} AFTER TRUNCATE ON {self.table} FOR EACH STATEMENT {rest};"
            )

        return [
            *self._functions(keys, compare=columns is None),
            "IF pg_catalog.current_setting('server_version_num')::integer >= 180000 THEN "
            f"{triggers(awake)} ELSE {triggers(f'{may_not_read} OR {awake}')} END IF",
        ]

    def _functions(self, keys: list[str], *, compare: bool) -> list[str]:
        # all run as their owner: whoever waits or writes needs no right to the sequence
        owned = "LANGUAGE sql VOLATILE SECURITY DEFINER"
        nothing = ", ".join(f"(NULL::{self.table}).{_escaped(key)}" for key in keys)
        return [
            # fails here, and not in a writer, where the type of a key cannot be hashed
            f"PERFORM pg_catalog.hash_record_extended(ROW({nothing}), 1)",
            f"CREATE SEQUENCE IF NOT EXISTS {self.lease}",
            f"GRANT SELECT ON SEQUENCE {self.lease} TO PUBLIC",  # it says when somebody waits, and no more
            f"CREATE OR REPLACE FUNCTION {self.awake}() RETURNS boolean {owned}"
            f" RETURN (SELECT NOT is_called AND last_value > {_NOW} FROM {self.lease})",
            # never ends a lease sooner: anybody may call it
            f"CREATE OR REPLACE FUNCTION {self.wake}(seconds double precision) RETURNS bigint {owned} RETURN (SELECT"
            f" pg_catalog.setval({self.lease_id}, GREATEST(({_NOW} + LEAST(seconds, 60))::bigint,"
            f" (SELECT last_value FROM {self.lease})), false)"
            f" FROM pg_catalog.pg_advisory_xact_lock_shared('{self.seed}'::bigint))",
            f"GRANT EXECUTE ON FUNCTION {self.awake}(), {self.wake}(double precision) TO PUBLIC",
            f"CREATE OR REPLACE FUNCTION {self.notify}() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
            f" SET search_path = pg_catalog, pg_temp"
            f" AS $txdeco_notify${self._body(keys, compare=compare)}$txdeco_notify$",
        ]

    def _body(self, keys: list[str], *, compare: bool) -> str:
        """Return what the trigger does once somebody waits, or has waited. It runs as the owner of the lease.

        The first row of a transaction asks until when, unless its session knows of a lease that goes on. If that is
        over the transaction need not ask again: those who begin to wait meanwhile wait for its end. It finds the lease
        by what the trigger, or the one of the partitioned table that it is a copy of, depends on: no renaming of tables
        and schemas changes that. Anybody may make a trigger that runs this, so it touches no sequence but leases; a
        lease that it cannot see, or may not use, counts as one that goes on. Nobody can renew a lease while it is given
        up: the lock that keeps them from it is given back with a savepoint, at once and however that ends; a sequence
        takes no part in savepoints.
        """
        same = "NOT pg_catalog.record_image_ne(OLD, NEW)" if compare else "false"
        return f"""
            DECLARE
                sent_name text = 'txdeco.sent_' || TG_RELID;  -- per transaction: how many hints; -1: nobody waits
                ends_name text = 'txdeco.ends_' || TG_RELID;  -- per session: until when somebody waits
                sent integer = coalesce(nullif(pg_catalog.current_setting(sent_name, true), ''), '0');
                ends bigint = coalesce(nullif(pg_catalog.current_setting(ends_name, true), ''), '0');
                now double precision = {_NOW};
                lease regclass;
                look text;
                is_called boolean;
            BEGIN
                IF TG_OP = 'UPDATE' THEN
                    IF {same} THEN
                        RETURN NULL;
                    END IF;
                END IF;
                {_LOOK_FOR_LEASE}
                IF sent < 0 THEN
                    RETURN NULL;
                ELSIF TG_OP = 'TRUNCATE' THEN
                    PERFORM pg_catalog.pg_notify(TG_ARGV[0], '');
                ELSIF sent < {HINTS} THEN
                    PERFORM pg_catalog.set_config(sent_name, (sent + 1)::text, true);
                    PERFORM pg_catalog.pg_notify(
                        TG_ARGV[0], pg_catalog.hash_record_extended({_row("OLD", keys)}, TG_ARGV[1]::bigint)::text);
                ELSIF sent = {HINTS} THEN
                    PERFORM pg_catalog.set_config(sent_name, (sent + 1)::text, true);
                    PERFORM pg_catalog.pg_notify(TG_ARGV[0], '');
                END IF;
                RETURN NULL;
            END """

    def drop(self) -> list[str]:
        """Return the commands that remove the watch."""
        return [
            *(f"DROP TRIGGER IF EXISTS {each} ON {self.table}" for each in TRIGGERS),
            f"DROP FUNCTION IF EXISTS {self.notify}()",
            f"DROP FUNCTION IF EXISTS {self.wake}(double precision)",
            f"DROP FUNCTION IF EXISTS {self.awake}()",
            f"DROP SEQUENCE IF EXISTS {self.lease}",
        ]


def one_command(commands: Iterable[str]) -> str:
    """A prepared statement, which is what asyncpg sends, holds one command."""
    body = "".join(f"    {command};\n" for command in commands)
    tag = "$txdeco$"
    while tag in body:
        tag = f"${tag.strip('$')}_$"
    return f"DO {tag}\nBEGIN\n{body}END\n{tag}"


def table_name(table: Table, translation: Mapping[str | None, str | None]) -> str:
    """Return the qualified and quoted name of *table* where *translation* puts it."""
    return _qualified(translation.get(table.schema, table.schema), table.name, _quoted)


def _row(which: str, columns: Iterable[str]) -> str:
    return f"ROW({', '.join(f'{which}.{_escaped(each)}' for each in columns)})"


def _qualified(schema: str | None, name: str, quote: Callable[[str], str] | None = None) -> str:
    quote = quote or _escaped
    return f"{quote(schema)}.{quote(name)}" if schema else quote(name)


@functools.cache
def _preparer() -> Any:
    from sqlalchemy.dialects.postgresql.asyncpg import dialect  # costs more to import than all of txdeco

    return dialect().identifier_preparer  # type: ignore[no-untyped-call]


def _quoted(name: str) -> str:
    return str(_preparer().quote_identifier(name)).replace("%%", "%")


def _escaped(name: str) -> str:
    """Quote a name so that neither `text()` (a colon) nor a driver (a percent sign) sees a parameter in it."""
    if not {":", "%"} & set(name):
        return _quoted(name)
    return "U&" + _quoted(name).replace("\\", "\\\\").replace(":", "\\003A").replace("%", "\\0025")


def _literal(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "''").replace(":", "\\072").replace("%", "\\045")
    return f"E'{escaped}'"
