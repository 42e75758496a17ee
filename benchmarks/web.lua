-- What wrk sends for benchmarks/web.py: one seat after another is booked, then one after another given back.
-- Arguments: the name of the train in a URL, and its seats.

local requests = {}
local at = 0

function init(arguments)
  local seats = tonumber(arguments[2])
  local headers = { ["Content-Type"] = "application/json" }
  for number = 1, 2 * seats do
    local method = number <= seats and "POST" or "DELETE"
    local path = "/trains/" .. arguments[1] .. "/seats/" .. (number - 1) % seats + 1
    requests[number] = wrk.format(method, path, headers, '{"passenger": "Ann"}')
  end
end

function request()
  at = at % #requests + 1
  return requests[at]
end

function done(summary, latency)
  local errors = summary.errors
  local broken = errors.connect + errors.read + errors.write + errors.timeout
  io.write(string.format(
    '\n{"answered": %d, "refused": %d, "broken": %d, "seconds": %f, "p50": %f, "p99": %f}\n',
    summary.requests, errors.status, broken, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3
  ))
end
