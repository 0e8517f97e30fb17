"""Is anybody sweeping? Exits 0 if some coordinator holds the sweep's advisory lock: rounds are opened and closed."""

import os
import sys

import psycopg

from app.coordinator import SWEEP_LOCK

HELD = """
    SELECT count(*) FROM pg_locks
    WHERE locktype = 'advisory' AND granted AND classid = %s AND objid = %s AND objsubid = 1
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""

url = os.environ.get("ISTHMUS_DATABASE_DIRECT_URL") or os.environ["ISTHMUS_DATABASE_URL"]
with psycopg.connect(url.replace("postgresql+psycopg:", "postgresql:", 1), connect_timeout=5) as connection:
    row = connection.execute(HELD, (SWEEP_LOCK >> 32, SWEEP_LOCK & 0xFFFF_FFFF)).fetchone()
sys.exit(0 if row and row[0] else 1)
