"""The scripts that load and save, and why a save may be told from every other one.

A hash holds the ``value``, a ``version`` that counts the saves, and ``saves``: which version each of the last few saves
has made, each with a token of its own. One script compares version and saves with what was loaded, and writes all
three, so a save is one message, and a script that arrives twice writes once.

When the answer to it is lost, the script may have run, may never run, or may run later: it can wait in a buffer of the
network or the server. So it does not help to look what is there. Another script, on another connection, decides:

- The save's own token is among ``saves``: it was written. That is success.
- The hash is as it was loaded: not yet. The script counts the version up (a fence), so that the save, should it still
  arrive, finds another version and writes nothing. Then certainly nothing is written, and the batch replays. Asked a
  second time, since this answer may be lost too, it finds the fence and says the same.
- Others have saved since, and the save that was loaded is still among ``saves``: then all that came after it is there
  too, and the own token is not. It can never be written any more: a conflict.
- Else (the hash was deleted, has expired or was lost with its server; somebody else saved more often than ``saves``
  goes back) nobody knows. The driver's error goes up as it is.

A version that began anew after a deletion would make an old save fit again. So a deleted resource leaves its version
and saves for some minutes, without a value. The same is the fence where there was nothing.
"""

from __future__ import annotations

from typing import Final

KEPT_SAVES: Final = 8
"""So many saves a hash remembers: it is long enough for those that others make while one looks for a lost answer."""

TRACE_MILLISECONDS: Final = 600_000
"""How long what has no value stays. Longer than a message can be delayed: TCP gives up after a quarter of that."""

# A script, since it goes to the primary also where a client reads from replicas, and past a client's own cache.
LOAD: Final = "return redis.call('HMGET', KEYS[1], 'value', 'version', 'saves')"

LOAD_OUTCOMES: Final = """
local found = {}
for i = 2, #KEYS do found[i - 1] = redis.call('GET', KEYS[i]) end
return found
"""

# Of both scripts the first three arguments are the version, the saves and whether there was a value, as loaded.
_IS_AS_LOADED: Final = """
local found = redis.call('HMGET', KEYS[1], 'version', 'saves')
local version, saves = found[1] or '', found[2] or ''
local as_loaded = version == ARGV[1] and saves == ARGV[2]
  and redis.call('HEXISTS', KEYS[1], 'value') == tonumber(ARGV[3])
"""

# Then: the new version, the new saves, milliseconds to live ('' leaves it, '0' is for ever), 1 and the value, or 0 and
# '' when it goes. Then, where outcomes are to be recorded at the other keys: their milliseconds to live, and the
# outcomes, a line each. (`unpack` takes no more than some thousands.)
#
# What a script has written stays when a later command of it is refused. So HSET, which is the save, comes when each
# other command was let through once without changing what anybody reads: a user may lack the right to one of them. Only
# the outcomes stand before it; if it is refused, they are made to expire, by the command that has just recorded them.
# Behind it nothing can fail but to give a trace its end. A server that has no memory, that may not write, or that is no
# primary refuses the first command that writes, or none.
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

# Then: the new version, the new saves with a fence in place of a save, the save's own token, the last save that was
# loaded, milliseconds to live of a hash that is nothing but a fence.
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
