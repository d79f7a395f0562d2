// A chat is a tree of messages; what is shown is the path from its first message to its head.

export class Tree {
  constructor(messages = [], head = null) {
    this.byId = new Map(messages.map((message) => [message.id, message]));
    this.head = this.byId.has(head) ? head : messages.at(-1)?.id ?? null;
  }

  add(message) {
    this.byId.set(message.id, message);
    this.head = message.id;
  }

  get path() {
    const found = [];
    for (let at = this.byId.get(this.head); at; at = this.byId.get(at.parent)) found.unshift(at);
    return found;
  }

  children(parent) {
    return [...this.byId.values()].filter((message) => message.parent === parent).sort((a, b) => a.id - b.id);
  }

  siblings(message) {
    return this.children(message.parent);
  }

  /** The newest message that follows this one. */
  leaf(message) {
    for (let at = message; at;) {
      const next = this.children(at.id).at(-1);
      if (!next) return at;
      at = next;
    }
  }
}
