// Accounts as Durable Objects, for `benchmarks.durable`: POST /add/KEY, /transfer/SOURCE/TARGET, /read/KEY.
import { DurableObject } from "cloudflare:workers";

export class Account extends DurableObject {
  async add(amount) {
    const value = ((await this.ctx.storage.get("value")) ?? 0) + amount;
    if (amount !== 0) await this.ctx.storage.put("value", value);
    return value; // held back until it is on the disk
  }
}

export default {
  async fetch(request, env) {
    const [, action, ...names] = new URL(request.url).pathname.split("/");
    const accounts = names.map((name) => env.ACCOUNTS.get(env.ACCOUNTS.idFromName(name)));
    if (action === "transfer") await accounts.shift().add(-1); // two saves: not atomic
    return Response.json(await accounts[0].add(action === "read" ? 0 : 1));
  },
};
