"""The scripts that load and save, and how a save recognises itself.

A hash holds the ``value``, a ``version`` that counts the saves, and ``saves``: the versions of the last few saves, each
with its token. One script compares version and saves with the loaded ones, and writes all three. So a save is one
message, and a script that arrives twice writes once. Resources that operations across keys connect are saved by one
script, with one token in each hash that it writes: it compares all hashes, and writes all or none.

If its answer is lost, the script may have run, may never run, or may run later: it can wait in a buffer of the network
or the server. So it does not help to look at the hash. Another script, on another connection, decides:

- The save's own token is among ``saves``: it was written. That is success.
- The hash is as it was loaded: it was not written yet. The script counts the version up (a fence). Should the save
  still arrive, it finds another version and writes nothing. So certainly nothing is written, and the batch replays. If
  this answer is lost too, the script is sent again, finds the fence and answers the same.
- Others have saved since, and the last loaded save is still among ``saves``: then every later save is there too, and
  the own token is not. The save can never be written any more: a conflict.
- Else the outcome is unknown: the hash was deleted, has expired or was lost with its server, or others have saved more
  often than ``saves`` goes back. So it is if another program has written a hash that no store had saved before: with
  ``saves`` empty, it may as well have been deleted and made anew. The driver's error goes up as it is.

Of a save of several hashes, each hash that it was to write can tell, since it has written all or none; and one fence is
enough, since it compares all. A hash without a version that is as it was loaded may have been deleted since, though. It
counts only if no other one was changed by others.

If the version began anew after a deletion, an old save could fit again. So a deleted resource leaves its version and
saves, without a value, for some minutes. A fence for a missing resource is the same.
"""

from __future__ import annotations

from typing import Final

KEPT_SAVES: Final = 8
"""How many saves a hash remembers: enough for those that others make during the search for a lost answer."""

TRACE_MILLISECONDS: Final = 600_000
"""How long a hash without a value stays. TCP gives a message up after a quarter of that."""


def _without_indents(script: str) -> str:
    """Return *script* shorter: it is sent, and digested by the server, each time."""
    return "\n".join([line.strip() for line in script.splitlines()])


# A script, since it goes to the primary even if a client reads from replicas, and past a client's own cache.
LOAD: Final = "return redis.call('HMGET', KEYS[1], 'value', 'version', 'saves')"

# Of many keys at one moment. An error stands as a text in place of its key's values.
LOAD_TOGETHER: Final = """
local found = {}
for i, name in ipairs(KEYS) do
  local values = redis.pcall('HMGET', name, 'value', 'version', 'saves')
  found[i] = values.err or values
end
return found
"""

LOAD_OUTCOMES: Final = """
local found = {}
for i, name in ipairs(KEYS) do found[i] = redis.call('GET', name) end
return found
"""

# Of SAVE and RESOLVE, in a loop over hashes: the arguments from *at* on are the version, the saves, and whether there
# was a value, as loaded.
_IS_AS_LOADED: Final = """
  local found = redis.call('HMGET', KEYS[i], 'version', 'saves')
  local saves = found[2] or ''
  local as_loaded = saves == ARGV[at + 1] and (found[1] or '') == ARGV[at]
    and redis.call('HEXISTS', KEYS[i], 'value') == tonumber(ARGV[at + 2])
"""

# The arguments: the number of hashes, which are the first keys; the milliseconds to live and the outcomes, a line each,
# that are to be recorded at the other keys. Then, for each hash, its state as loaded, the new version ('' only compares
# it), the new saves, milliseconds to live ('' leaves it, '0' is for ever), 1 and the value, or 0 and '' to delete it.
# (`unpack` takes no more than some thousands.)
#
# If a later command is refused, a script's earlier writes stay. So HSET, which is the save, comes after each other
# command has been let through once without a visible change: a user may lack the right to one of them. Only the
# outcomes are written before it. If it is refused, they are made to expire, by the command that has just recorded them.
# Behind the first HSET, nothing can fail but the expiry of a trace: no other hash is written before the user's right to
# write each was asked for. (Before Redis 7, which has `acl_check_cmd`, a user who may write one of them may write all.)
# A server that has no memory, may not write, or is no primary refuses the first command that writes, or none.
SAVE: Final = _without_indents(
    """
local count = tonumber(ARGV[1])
for i = 1, count do
  local at = 8 * i - 4
"""
    + _IS_AS_LOADED
    + """
  if not as_loaded then return -i end
end
local repeated = {}
for first = count + 1, #KEYS, 1000 do
  local last = math.min(first + 999, #KEYS)
  local there = 0
  for i, outcome in ipairs(redis.call('MGET', unpack(KEYS, first, last))) do
    if outcome then there = there + 1 end
    if outcome and outcome ~= '' then
      repeated[#repeated + 1] = first + i - count - 2
      repeated[#repeated + 1] = outcome
    end
  end
  if redis.call('EXISTS', unpack(KEYS, first, last)) ~= there then
    return redis.error_reply('WRONGTYPE an outcome would take the place of something else')
  end
end
if #repeated > 0 then return repeated end
if count > 1 and redis.acl_check_cmd then
  for i = 1, #KEYS do
    local command = i > count and 'SET' or ARGV[8 * i - 1] ~= '' and 'HSET'
    if command and not redis.acl_check_cmd(command, KEYS[i], 'version', '') then
      return redis.error_reply('NOPERM no right to ' .. command .. ' of ' .. KEYS[i])
    end
  end
end
local lifeless = {}
for i = 1, count do
  local at = 8 * i - 4
  local lives = ARGV[at + 5]
  if ARGV[at + 3] == '' then
  elseif ARGV[at + 6] == '0' then
    redis.call('HDEL', KEYS[i], 'geventbatch:nothing')
  elseif lives == '0' then
    redis.call('PERSIST', KEYS[i])
  elseif lives ~= '' and redis.call('PEXPIRE', KEYS[i], lives) == 0 then
    lifeless[i] = true
  end
end
local recorded = count
for outcome in ARGV[3]:gmatch('[^\\n]+') do
  recorded = recorded + 1
  redis.call('SET', KEYS[recorded], outcome, 'PX', ARGV[2])
end
for i = 1, count do
  local at = 8 * i - 4
  if ARGV[at + 3] ~= '' then
    local saved
    if ARGV[at + 6] == '1' then
      saved = redis.pcall('HSET', KEYS[i], 'version', ARGV[at + 3], 'saves', ARGV[at + 4], 'value', ARGV[at + 7])
    else
      saved = redis.pcall('HSET', KEYS[i], 'version', ARGV[at + 3], 'saves', ARGV[at + 4])
    end
    if type(saved) == 'table' and saved.err then
      for i = count + 1, recorded do redis.call('SET', KEYS[i], '', 'PX', 1) end
      return redis.error_reply('NOTSAVED ' .. saved.err)
    end
    if ARGV[at + 6] == '0' then
      redis.call('HDEL', KEYS[i], 'value')
      redis.pcall('PEXPIRE', KEYS[i], ARGV[at + 5])
    elseif lifeless[i] then
      redis.call('PEXPIRE', KEYS[i], ARGV[at + 5])
    end
  end
end
return 1
"""
)

# The arguments: the number of hashes, the save's own token, and the milliseconds to live of a hash that is only a
# fence. Then, for each hash that was to be written, its state as loaded, the new version, the new saves with a fence
# instead of a save, and the last loaded save.
RESOLVE: Final = _without_indents(
    """
local fenced, changed, old, new, unknown
for i = 1, tonumber(ARGV[1]) do
  local at = 6 * i - 2
"""
    + _IS_AS_LOADED
    + """
  local last = ARGV[at + 5]
  if saves:find(':' .. ARGV[2], 1, true) then return 'saved' end
  if saves:find('!' .. ARGV[2], 1, true) then
    fenced = true
  elseif as_loaded then
    if ARGV[at] == '' then new = i else old = i end
  elseif last ~= '' and saves:find(last, 1, true) then
    changed = true
  else
    unknown = true
  end
end
if fenced then return 'fenced' end
if changed then return 'changed' end
local place = old or not unknown and new
if not place then return 'unknown' end
local at = 6 * place - 2
redis.call('HSET', KEYS[place], 'version', ARGV[at + 3], 'saves', ARGV[at + 4])
if ARGV[at] == '' and ARGV[at + 2] == '0' then redis.pcall('PEXPIRE', KEYS[place], ARGV[3]) end
return 'fenced'
"""
)
