/* SPDX-License-Identifier: MIT OR GPL-2.0-only
 *
 * Packets that the kernel drops, for captures and traces: a program at the tracepoint skb:kfree_skb. Of packets in watched network namespaces,
 * from or to watched addresses, it hands on the time, the reason, and the beginning of the packet. daemon/kernel/src/trace/kernel.rs
 * loads it and reads what it hands on; both have `struct dropped`.
 *
 * It reads memory of the kernel only where the kernel's own description of its types (BTF) says that the fields are. It changes
 * nothing.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SEC(name) __attribute__((section(name), used))
#define LITTLE_ENDIAN_16(x) ((u16)((x) << 8 | (x) >> 8))

/* Types of maps and helpers (linux/bpf.h). */
enum {
	MAP_HASH = 1,
	MAP_PERCPU_ARRAY = 6,
	MAP_LPM_TRIE = 11,
	MAP_RINGBUF = 27,
	WITHOUT_PREALLOCATION = 1,
};

static void *(*const lookup)(void *map, const void *key) = (void *)1;
static u64 (*const now)(void) = (void *)5;
static long (*const read_kernel)(void *to, u32 size, const void *from) = (void *)113;
static void *(*const reserve)(void *map, u64 size, u64 flags) = (void *)131;
static void (*const submit)(void *data, u64 flags) = (void *)132;
static void (*const discard)(void *data, u64 flags) = (void *)133;

/* The fields of the kernel's types that are read. Where they are is filled in when the program is loaded. */
#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)
struct ns_common {
	u32 inum;
};
struct net {
	struct ns_common ns;
};
typedef struct {
	struct net *net;
} possible_net_t;
struct net_device {
	possible_net_t nd_net;
};
struct sk_buff {
	struct net_device *dev;
	unsigned char *head;
	u16 network_header;
	u16 protocol;
};
#pragma clang attribute pop

#define READ(to, from) read_kernel(&(to), sizeof(to), &(from))

/* How much of a packet is handed on: the headers of IPv6, UDP, VXLAN, Ethernet, IPv6 and ICMP, and the cookie of a probe. */
#define BEGINNING 128
/* The maximum number of packets a second that a CPU hands on. */
#define RATE 2000

struct dropped {
	u64 at; /* CLOCK_MONOTONIC, nanoseconds */
	u32 reason; /* enum skb_drop_reason */
	u32 space; /* the number of the network namespace */
	u8 packet[BEGINNING]; /* from the IP header on */
};

/* An address with the length of its prefix, IPv4 as ::ffff:0:0/96. */
struct prefix {
	u32 length;
	u8 address[16];
};

struct rate {
	u64 second;
	u64 count;
};

struct {
	int (*type)[MAP_RINGBUF];
	int (*max_entries)[512 * 1024];
} events SEC(".maps");

struct {
	int (*type)[MAP_HASH];
	int (*max_entries)[4096];
	u32 *key;
	u8 *value;
} spaces SEC(".maps");

struct {
	int (*type)[MAP_LPM_TRIE];
	int (*max_entries)[4096];
	int (*map_flags)[WITHOUT_PREALLOCATION];
	struct prefix *key;
	u8 *value;
} watched SEC(".maps");

struct {
	int (*type)[MAP_PERCPU_ARRAY];
	int (*max_entries)[1];
	u32 *key;
	struct rate *value;
} rates SEC(".maps");

static __attribute__((always_inline)) int is_watched(const u8 *address, int ipv4)
{
	struct prefix prefix = { .length = 128 };

	if (ipv4) {
		prefix.address[10] = prefix.address[11] = 0xff;
		__builtin_memcpy(prefix.address + 12, address, 4);
	} else {
		__builtin_memcpy(prefix.address, address, 16);
	}
	return lookup(&watched, &prefix) != 0;
}

static __attribute__((always_inline)) int is_too_many(u64 at)
{
	u32 first = 0;
	struct rate *rate = lookup(&rates, &first);

	if (!rate)
		return 1;
	if (rate->second != at >> 30) {
		rate->second = at >> 30;
		rate->count = 0;
	}
	return rate->count++ >= RATE;
}

SEC("raw_tp/kfree_skb")
int dropped_packet(u64 *arguments)
{
	struct sk_buff *skb = (struct sk_buff *)arguments[0];
	struct net_device *device = 0;
	struct net *net = 0;
	unsigned char *head = 0;
	u16 offset = 0, protocol = 0;
	u32 space = 0;
	struct dropped *event;
	u64 at;
	int ipv4;

	READ(protocol, skb->protocol);
	ipv4 = protocol == LITTLE_ENDIAN_16(0x0800);
	if (!ipv4 && protocol != LITTLE_ENDIAN_16(0x86dd))
		return 0;
	if (READ(device, skb->dev) || !device || READ(net, device->nd_net.net) || READ(space, net->ns.inum))
		return 0;
	if (!lookup(&spaces, &space))
		return 0;
	READ(head, skb->head);
	READ(offset, skb->network_header);
	event = reserve(&events, sizeof(*event), 0);
	if (!event)
		return 0;
	if (read_kernel(event->packet, BEGINNING, head + offset))
		goto not_wanted;
	if (ipv4 ? !is_watched(event->packet + 12, 1) && !is_watched(event->packet + 16, 1)
		 : !is_watched(event->packet + 8, 0) && !is_watched(event->packet + 24, 0))
		goto not_wanted;
	at = now();
	if (is_too_many(at))
		goto not_wanted;
	event->at = at;
	event->reason = (u32)arguments[2];
	event->space = space;
	submit(event, 0);
	return 0;
not_wanted:
	discard(event, 0);
	return 0;
}

char licence[] SEC("license") = "Dual MIT/GPL";
