"""The rows of a dataset host by host: the view `hosts`.

In: the view `rows`. Out: for each host of the URLs as given (not where they were redirected to), how many rows, what
became of them, how long they took and how many bytes came. A row without a URL, such as an adopted one, has no host and
is not counted. Nothing is read before the view is asked.
"""

from __future__ import annotations

__all__ = ["HOSTS_SQL"]

# What is no failure of the host: it said no, it was not asked yet, or the recipe did not want what it gave.
_NOT_FAILED = ("ok", "opted_out", "deferred", "filtered", "blocked", "purged")

# `http://me@Host.test:80/a` → `host.test`. Taking a URL apart is most of the work, so that each way in which a host is
# written is looked at once, and the rows are grouped by that before they are grouped by host.
_BARE = "split_part(split_part(written, '?', 1), '#', 1)"
_HOST = f"lower(regexp_extract({_BARE}, '^(?:.*@)?(\\[[^\\]]*\\]|[^:]*?)\\.?(?::[0-9]*)?$', 1))"

HOSTS_SQL = f"""
WITH asked AS (
  SELECT split_part(url, '/', 3) AS written, status, count(*) AS n, coalesce(sum(size_bytes), 0) AS b,
    list(fetch_ms) FILTER (fetch_ms IS NOT NULL) AS taken
  FROM rows WHERE contains(url, '://') GROUP BY ALL
),
counted AS MATERIALIZED (SELECT {_HOST} AS host, status, n, b, taken FROM asked),
spread AS (
  SELECT host, quantile_cont(ms, [0.5, 0.95]) AS q FROM (SELECT host, unnest(taken) AS ms FROM counted) GROUP BY host
)
SELECT host, rows, ok, failed, opted_out, deferred, statuses,
  round(q[1], 1) AS median_ms, round(q[2], 1) AS p95_ms, bytes
FROM (
  SELECT host,
    sum(n)::BIGINT AS rows,
    coalesce(sum(n) FILTER (status = 'ok'), 0)::BIGINT AS ok,
    coalesce(sum(n) FILTER (status NOT IN ({", ".join(f"'{s}'" for s in _NOT_FAILED)})), 0)::BIGINT AS failed,
    coalesce(sum(n) FILTER (status = 'opted_out'), 0)::BIGINT AS opted_out,
    coalesce(sum(n) FILTER (status = 'deferred'), 0)::BIGINT AS deferred,
    map_from_entries(list((status, n) ORDER BY n DESC, status) FILTER (status <> 'ok')) AS statuses,
    sum(b)::BIGINT AS bytes
  FROM counted WHERE host <> '' GROUP BY host
) LEFT JOIN spread USING (host)
"""
