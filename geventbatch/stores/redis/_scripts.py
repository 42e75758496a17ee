"""The scripts that load and save, and how a save recognises itself.

A hash holds the ``value``, a ``version`` that counts the saves, and ``saves``: the versions of the last few saves, each
with its token. One script compares version and saves with the loaded ones, and writes all three. So a save is one
message, and a script that arrives twice writes once.

If its answer is lost, the script may have run, may never run, or may run later: it can wait in a buffer of the network
or the server. So it does not help to look at the hash. Another script, on another connection, decides:

- The save's own token is among ``saves``: it was written. That is success.
- The hash is as it was loaded: it was not written yet. The script counts the version up (a fence). Should the save
  still arrive, it finds another version and writes nothing. So certainly nothing is written, and the batch replays. If
  this answer is lost too, the script is sent again, finds the fence and answers the same.
- Others have saved since, and the last loaded save is still among ``saves``: then every later save is there too, and
  the own token is not. The save can never be written any more: a conflict.
- Else the outcome is unknown: the hash was deleted, has expired or was lost with its server, or others have saved more
  often than ``saves`` goes back. The driver's error goes up as it is.

If the version began anew after a deletion, an old save could fit again. So a deleted resource leaves its version and
saves, without a value, for some minutes. A fence for a missing resource is the same.
"""

from __future__ import annotations

from typing import Final

KEPT_SAVES: Final = 8
"""How many saves a hash remembers: enough for those that others make during the search for a lost answer."""

TRACE_MILLISECONDS: Final = 600_000
"""How long a hash without a value stays. TCP gives a message up after a quarter of that."""

# A script, since it goes to the primary even if a client reads from replicas, and past a client's own cache.
LOAD: Final = "return redis.call('HMGET', KEYS[1], 'value', 'version', 'saves')"

LOAD_OUTCOMES: Final = """
local found = {}
for i = 2, #KEYS do found[i - 1] = redis.call('GET', KEYS[i]) end
return found
"""

# Of SAVE and RESOLVE, the first three arguments are the version, the saves and whether there was a value, as loaded.
_IS_AS_LOADED: Final = """
local found = redis.call('HMGET', KEYS[1], 'version', 'saves')
local version, saves = found[1] or '', found[2] or ''
local as_loaded = version == ARGV[1] and saves == ARGV[2]
  and redis.call('HEXISTS', KEYS[1], 'value') == tonumber(ARGV[3])
"""

# Then: the new version, the new saves, milliseconds to live ('' leaves it, '0' is for ever), 1 and the value, or 0 and
# '' to delete it. Then, if outcomes are to be recorded at the other keys: their milliseconds to live, and the outcomes,
# a line each. (`unpack` takes no more than some thousands.)
#
# If a later command is refused, a script's earlier writes stay. So HSET, which is the save, comes after each other
# command has been let through once without a visible change: a user may lack the right to one of them. Only the
# outcomes are written before it. If it is refused, they are made to expire, by the command that has just recorded them.
# After it, nothing can fail but the expiry of a trace. A server that has no memory, may not write, or is no primary
# refuses the first command that writes, or none.
SAVE: Final = (
    _IS_AS_LOADED
    + """
if not as_loaded then return 0 end
local repeated = {}
for first = 2, #KEYS, 1000 do
  local last = math.min(first + 999, #KEYS)
  local there = 0
  for i, outcome in ipairs(redis.call('MGET', unpack(KEYS, first, last))) do
    if outcome then there = there + 1 end
    if outcome and outcome ~= '' then
      repeated[#repeated + 1] = first + i - 3
      repeated[#repeated + 1] = outcome
    end
  end
  if redis.call('EXISTS', unpack(KEYS, first, last)) ~= there then
    return redis.error_reply('WRONGTYPE an outcome would take the place of something else')
  end
end
if #repeated > 0 then return repeated end
local has_life = 1
if ARGV[7] == '0' then
  redis.call('HDEL', KEYS[1], 'geventbatch:nothing')
elseif ARGV[6] == '0' then
  redis.call('PERSIST', KEYS[1])
elseif ARGV[6] ~= '' then
  has_life = redis.call('PEXPIRE', KEYS[1], ARGV[6])
end
local recorded = 1
if ARGV[10] then
  for outcome in ARGV[10]:gmatch('[^\\n]+') do
    recorded = recorded + 1
    redis.call('SET', KEYS[recorded], outcome, 'PX', ARGV[9])
  end
end
local saved
if ARGV[7] == '1' then
  saved = redis.pcall('HSET', KEYS[1], 'version', ARGV[4], 'saves', ARGV[5], 'value', ARGV[8])
else
  saved = redis.pcall('HSET', KEYS[1], 'version', ARGV[4], 'saves', ARGV[5])
end
if type(saved) == 'table' and saved.err then
  for i = 2, recorded do redis.call('SET', KEYS[i], '', 'PX', 1) end
  return redis.error_reply('NOTSAVED ' .. saved.err)
end
if ARGV[7] == '0' then
  redis.call('HDEL', KEYS[1], 'value')
  redis.pcall('PEXPIRE', KEYS[1], ARGV[6])
elseif has_life == 0 then
  redis.call('PEXPIRE', KEYS[1], ARGV[6])
end
return 1
"""
)

# Then: the new version, the new saves with a fence instead of a save, the save's own token, the last loaded save, and
# the milliseconds to live of a hash that is only a fence.
RESOLVE: Final = (
    _IS_AS_LOADED
    + """
if saves:find(':' .. ARGV[6], 1, true) then return 'saved' end
if saves:find('!' .. ARGV[6], 1, true) then return 'fenced' end
if as_loaded then
  redis.call('HSET', KEYS[1], 'version', ARGV[4], 'saves', ARGV[5])
  if ARGV[1] == '' and ARGV[3] == '0' then redis.pcall('PEXPIRE', KEYS[1], ARGV[8]) end
  return 'fenced'
end
if ARGV[7] ~= '' and saves:find(ARGV[7], 1, true) then return 'changed' end
return 'unknown'
"""
)
