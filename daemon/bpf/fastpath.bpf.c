/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* The programs of ovl's fast path: docs/fast-path.md says what each does, and what it leaves alone.
 *
 *   from_pod       ingress of the host's interface of an endpoint: what the endpoint sends
 *   from_underlay  ingress of the device of the underlay: what other hosts send
 *   from_stack     egress of the interfaces of endpoints, of VXLAN devices and of the underlay's device: what the stack sends
 *
 * Whatever they do not know, they leave to the host's IP stack, which does what it does without them. No packet is dropped
 * here, except one that is already changed when the kernel refuses the rest.
 *
 * Redirected packets pass no netfilter. So what the stack translates (Services, published ports) must not be answered by
 * the fast path. `flows` remembers of a flow that the stack does not translate it. That is known when one of its packets
 * leaves the stack as it entered: from_pod and from_underlay give it a hash of its addresses and ports (skb->hash, which
 * goes with it), and from_stack compares. It is also known of a TCP connection that begins: the SYN is to an endpoint's
 * own address. A flow that is forgotten is one that is not known yet: its next packet takes the stack.
 *
 * The stack judges flows of endpoints that a network policy selects (POD_SELECTED). from_stack sees only what the stack has let
 * through, so such a flow is remembered together with host->verdicts, which increases after each change of policies. Connection
 * tracking has to go on knowing it: what begins and ends a connection takes the stack, and so does one packet of each direction
 * every second or two. */

#include "packet.h"

char declared_license[] SEC("license") = "Dual MIT/GPL";

#define SHOT 2

/* The mark of packets that the programs send to another host, so that from_stack knows them. It is taken off there. */
#define REDIRECTED 0x6f766c66

INLINE void count(__u32 what, __u32 length)
{
	struct counter *counter = map_lookup(&counters, &what);

	if (counter) {
		counter->packets++;
		counter->bytes += length;
	}
}

INLINE int leave(struct __sk_buff *skb, __u32 why)
{
	count(why, skb->len);
	return NEXT;
}

INLINE struct host *this_host(void)
{
	__u32 zero = 0;
	struct host *found = map_lookup(&host, &zero);

	return found && found->on ? found : 0;
}

/* Read once: what a packet is remembered with must be what it was compared with. */
INLINE __u32 verdicts_of(const struct host *host)
{
	return *(const volatile __u32 *)&host->verdicts;
}

/* The time that `struct memory` has, in units of 2^30 ns. Never near 0, which stands for "never". */
INLINE __u32 ticks(void)
{
	return (__u32)(coarse_time() >> 30) + 16;
}

/* How old the last packet in the stack may be. Connection tracking forgets UDP after 30 s. Sequence numbers must not have gone
 * half way round since, or it takes a RST for an old one: 2 GiB in 2 s are 8 Gbit/s. */
#define RECENT 1

INLINE struct path *path_to(const struct address *address)
{
	struct prefix key = { .length = 128, .address = *address };

	return map_lookup(&paths, &key);
}

/* Finds the entry of a flow: the same for both directions. Returns which one this is, 0 or 1. */
INLINE int flow_of(const struct packet *packet, struct flow *flow)
{
	int later = 0;

	for (int i = 3; i >= 0; i--) {
		__u32 from = packet->from.word[i], to = packet->to.word[i];

		if (from != to) {
			later = from > to;
			goto found;
		}
	}
	later = packet->from_port > packet->to_port;
found:
	if (later) {
		flow->a = packet->to;
		flow->b = packet->from;
		flow->a_port = packet->to_port;
		flow->b_port = packet->from_port;
	} else {
		flow->a = packet->from;
		flow->b = packet->to;
		flow->a_port = packet->from_port;
		flow->b_port = packet->to_port;
	}
	flow->protocol = packet->transport;
	return later;
}

/* What `flows` has of a flow that the stack does not translate. Never FLOW_SLOW. */
INLINE __u32 epoch_of(const struct host *host, const struct pod *a, const struct pod *b)
{
	return ((host->generation + (a ? a->epoch : 0) + (b ? b->epoch : 0)) << 1) | 1;
}

INLINE __u32 mix(__u32 hash, __u32 word)
{
	hash = (hash ^ word) * 0x9e3779b1;
	return hash ^ (hash >> 15);
}

/* Whether a network policy selects one of the ends that are endpoints of this host. */
INLINE int is_selected(const struct pod *a, const struct pod *b)
{
	return ((a ? a->flags : 0) | (b ? b->flags : 0)) & POD_SELECTED;
}

/* A hash of the addresses and ports as they are in this packet. Of the verdicts too: a packet that was in the stack while they
 * changed may have been let through by the old ones. */
INLINE __u32 token_of(const struct packet *packet)
{
	__u32 hash = mix(packet->transport ^ packet->verdicts << 8, packet->from_port << 16 | packet->to_port);

	hash = mix(mix(hash, packet->from.word[3]), packet->to.word[3]);
	if (is_ipv6(packet)) {
		for (int i = 0; i < 3; i++)
			hash = mix(mix(hash, packet->from.word[i]), packet->to.word[i]);
	}
	return hash ? hash : 1;
}

/* Leaves a packet to the stack that will not translate it, for all that is known, so that from_stack sees that. */
INLINE int leave_known(struct __sk_buff *skb, const struct packet *packet, __u32 why)
{
	set_hash(skb, token_of(packet));
	return leave(skb, why);
}

INLINE int begins_connection(const struct packet *packet)
{
	__u8 all = TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN;

	return packet->transport == PROTOCOL_TCP && (packet->tcp_flags & all) == TCP_SYN;
}

/* Whether connection tracking has to see a packet: it begins or ends a connection, or has flags that belong to none. */
INLINE int is_for_tracking(const struct packet *packet)
{
	__u8 all = TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN;

	return packet->transport == PROTOCOL_TCP && (packet->tcp_flags & all) != TCP_ACK;
}

/* Whether the stack leaves the flow of this packet untranslated and lets it through. If that is not known, the packet is
 * prepared so that from_stack sees it. */
INLINE int is_known(struct __sk_buff *skb, const struct packet *packet, __u32 epoch, int selected)
{
	struct flow key = {};
	struct memory *known, new = { .epoch = epoch };
	int direction = flow_of(packet, &key), is_slow, is_current;

	known = map_lookup(&flows, &key);
	is_slow = known && known->epoch == FLOW_SLOW;
	is_current = known && known->epoch == epoch;
	if (selected) {
		if (is_current && is_for_tracking(packet))
			map_delete(&flows, &key);
		else if (is_current && known->verdicts == packet->verdicts &&
			 ticks() - (direction ? known->seen[1] : known->seen[0]) <= RECENT)
			return 1;
		leave_known(skb, packet, is_slow ? COUNT_TRANSLATED : COUNT_POLICY);
		return 0;
	}
	if (is_current) {
		/* What comes next with these addresses and ports is another connection. */
		if (packet->tcp_flags & TCP_RST)
			map_delete(&flows, &key);
		return 1;
	}
	if (begins_connection(packet) && !is_slow)
		return map_update(&flows, &key, &new, BPF_ANY) == 0;
	leave_known(skb, packet, is_slow ? COUNT_TRANSLATED : COUNT_NEW_FLOW);
	return 0;
}

/* Whether a packet may pass the stack by, on a path with this MTU. If not, it is prepared for the stack. */
INLINE int may_pass(struct __sk_buff *skb, const struct packet *packet, int switched, __u32 mtu, __u32 epoch, int selected)
{
	if (!switched && packet->ttl <= 1) {
		leave_known(skb, packet, COUNT_HOP_LIMIT);
		return 0;
	}
	if (wire_length(skb, packet) > mtu) {
		leave_known(skb, packet, COUNT_TOO_BIG);
		return 0;
	}
	return is_known(skb, packet, epoch, selected);
}

/* Hands a packet to a local endpoint, as it is. `queued`: by the host's interface, in place of past it. */
INLINE int hand_over(struct __sk_buff *skb, const struct pod *pod, int queued)
{
	__u32 ifindex = pod->ifindex;
	struct counter *counter;

	if (queued) {
		skb->mark = REDIRECTED;
		return redirect(ifindex, 0);
	}
	counter = map_lookup(&delivered, &ifindex);
	if (counter) {
		counter->packets++;
		counter->bytes += skb->len;
	}
	return redirect_peer(ifindex, 0);
}

/* Hands a packet from the sender with this MAC address to a local endpoint. Its TTL must have been decremented. */
INLINE int deliver(struct __sk_buff *skb, const struct packet *packet, const struct pod *pod, const __u8 *from, int queued)
{
	if (!write_ethernet(skb, pod->mac, from, packet->protocol))
		return SHOT;
	return hand_over(skb, pod, queued || pod->flags & POD_QUEUED);
}

/* Finds the next hop, as the host's routes have it. False if there is none by the underlay's device, or if the packet is
 * too big for it. */
INLINE int find_next_hop(struct __sk_buff *skb, const struct host *host, struct bpf_fib_lookup *hop, __u32 flags)
{
	if (fib_lookup(skb, hop, sizeof(*hop), flags) != BPF_FIB_LKUP_RET_SUCCESS)
		return 0;
	return hop->ifindex == host->underlay;
}

INLINE int send_direct(struct __sk_buff *skb, const struct packet *packet, const struct host *host)
{
	struct bpf_fib_lookup hop = {};

	hop.l4_protocol = packet->transport;
	hop.sport = packet->from_port;
	hop.dport = packet->to_port;
	hop.tot_len = wire_length(skb, packet);
	hop.ifindex = skb->ifindex;
	if (is_ipv6(packet)) {
		hop.family = FAMILY_IPV6;
		for (int i = 0; i < 4; i++) {
			hop.ipv6_src[i] = packet->from.word[i];
			hop.ipv6_dst[i] = packet->to.word[i];
		}
	} else {
		hop.family = FAMILY_IPV4;
		hop.tos = packet->tos;
		hop.ipv4_src = packet->from.word[3];
		hop.ipv4_dst = packet->to.word[3];
	}
	if (!find_next_hop(skb, host, &hop, 0))
		return leave_known(skb, packet, COUNT_NEXT_HOP);
	count(COUNT_DIRECT_OUT, skb->len);
	if (!forward(skb, packet, 0) || !write_ethernet(skb, hop.dmac, hop.smac, packet->protocol))
		return SHOT;
	skb->mark = REDIRECTED;
	return redirect(hop.ifindex, 0);
}

/* The headers in front of the packet inside, as the kernel's VXLAN device writes them. */
struct outer {
	struct ethernet ethernet;
	struct ipv4 ip;
	struct udp udp;
	struct vxlan vxlan;
	struct ethernet inner;
} __attribute__((packed));

#define ROOM ((int)(sizeof(struct outer) - ETHERNET))

/* The range of source ports that the kernel's VXLAN device uses if ip_local_port_range is the default. */
#define FIRST_PORT 32768
#define PORTS 28232
/* INET_ECN_CE and the mask of ECN (RFC 6040). */
#define ECN 3
#define ECN_ECT0 2
#define ECN_CE 3
#define TTL 64

/* Sends a packet in VXLAN, in a frame from this MAC address. */
INLINE int send_vxlan(struct __sk_buff *skb, const struct packet *packet, const struct host *host, const struct path *path,
		      const __u8 *from)
{
	struct bpf_fib_lookup hop = {};
	struct outer *outer;
	__u32 sum, hash;
	__u8 ecn;

	if (!host->vtep)
		return leave_known(skb, packet, COUNT_NEXT_HOP);
	hop.family = FAMILY_IPV4;
	hop.l4_protocol = PROTOCOL_UDP;
	hop.dport = path->port;
	hop.tot_len = wire_length(skb, packet) + ROOM;
	hop.ifindex = host->underlay;
	hop.ipv4_src = host->vtep;
	hop.ipv4_dst = path->vtep;
	if (!find_next_hop(skb, host, &hop, BPF_FIB_LOOKUP_OUTPUT))
		return leave_known(skb, packet, COUNT_NEXT_HOP);
	hash = get_hash(skb);
	if (adjust_room(skb, ROOM, BPF_ADJ_ROOM_MAC,
			BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
				BPF_F_ADJ_ROOM_ENCAP_L2(ETHERNET) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH))
		return leave_known(skb, packet, COUNT_NEXT_HOP);
	count(COUNT_VXLAN_OUT, skb->len);
	if (path->kind == PATH_VXLAN && !forward(skb, packet, ROOM))
		return SHOT;
	outer = (void *)(long)skb->data;
	if ((void *)(outer + 1) > (void *)(long)skb->data_end)
		return SHOT;
	copy_mac(outer->ethernet.to, hop.dmac);
	copy_mac(outer->ethernet.from, hop.smac);
	outer->ethernet.protocol = be16(ETH_P_IP);
	ecn = packet->tos & ECN;
	outer->ip.version_length = 0x45;
	outer->ip.tos = ecn == ECN_CE ? ECN_ECT0 : ecn;
	outer->ip.length = be16(skb->len - ETHERNET);
	outer->ip.id = random32();
	outer->ip.fragment = 0;
	outer->ip.ttl = TTL;
	outer->ip.protocol = PROTOCOL_UDP;
	outer->ip.check = 0;
	outer->ip.from = host->vtep;
	outer->ip.to = path->vtep;
	sum = sum_of(&outer->ip);
	outer->ip.check = ~((sum & 0xffff) + (sum >> 16));
	hash ^= hash << 16;
	outer->udp.from = be16(FIRST_PORT + (__u16)(((__u64)hash * PORTS) >> 32));
	outer->udp.to = path->port;
	outer->udp.length = be16(skb->len - ETHERNET - IPV4);
	/* None: what is inside has its own, and the receiver's kernel takes that (RFC 7348, section 4.1). */
	outer->udp.check = 0;
	outer->vxlan.flags = be32(0x08000000);
	outer->vxlan.vni = be32(path->vni << 8);
	copy_mac(outer->inner.to, path->mac);
	copy_mac(outer->inner.from, from);
	outer->inner.protocol = packet->protocol;
	skb->mark = REDIRECTED;
	return redirect(hop.ifindex, 0);
}

SEC("classifier")
int from_pod(struct __sk_buff *skb)
{
	struct host *host = this_host();
	struct pod *source, *target;
	struct path *path = 0;
	struct packet packet = {};
	struct ethernet *ethernet;
	int switched;

	if (!host || (skb->pkt_type != FOR_THIS_HOST && skb->pkt_type != FOR_ANOTHER_HOST) || skb->vlan_present ||
	    !read_packet(skb, 0, &packet, 0))
		return NEXT;
	packet.verdicts = verdicts_of(host);
	source = map_lookup(&pods, &packet.from);
	ethernet = (void *)(long)skb->data;
	if ((void *)(ethernet + 1) > (void *)(long)skb->data_end)
		return NEXT;
	if (!source || source->ifindex != skb->ifindex || !same_mac(source->mac, ethernet->from))
		return leave(skb, COUNT_SOURCE);
	if (!(source->flags & POD_FAST))
		return NEXT;
	/* On a routed network frames are for the gateway, on a switched one for the other endpoint. */
	switched = (source->flags & POD_SWITCHED) != 0;
	if (switched != (skb->pkt_type == FOR_ANOTHER_HOST))
		return NEXT;
	target = map_lookup(&pods, &packet.to);
	if (target) {
		if (!(target->flags & POD_FAST) || target->network != source->network || target == source)
			return NEXT;
		if (switched && !same_mac(target->mac, ethernet->to))
			return NEXT;
	} else {
		path = path_to(&packet.to);
		if (!path || path->network != source->network || (path->kind == PATH_SWITCHED) != switched)
			return NEXT;
		if (switched && !same_mac(path->mac, ethernet->to))
			return NEXT;
	}
	if (!may_pass(skb, &packet, switched, target ? target->mtu : path ? path->mtu : 0, epoch_of(host, source, target),
		      is_selected(source, target)))
		return NEXT;
	if (switched)
		change_type(skb, FOR_THIS_HOST);
	if (target) {
		count(COUNT_LOCAL, skb->len);
		if (switched)
			return hand_over(skb, target, target->flags & POD_QUEUED);
		if (!forward(skb, &packet, 0))
			return SHOT;
		return deliver(skb, &packet, target, target->gateway, 0);
	}
	if (!path)
		return NEXT;
	if (path->kind == PATH_DIRECT)
		return send_direct(skb, &packet, host);
	return send_vxlan(skb, &packet, host, path, switched ? source->mac : path->mine);
}

/* Takes VXLAN off a packet of another host for an endpoint of this one. */
INLINE int receive_vxlan(struct __sk_buff *skb, const struct host *host)
{
	struct packet packet = {};
	struct outer *outer;
	struct path *path;
	struct pod *target;
	__u32 vni, from;
	__u64 flags;
	int switched, queued = 0;

	/* On many devices only the outer headers are in the part that is read directly. */
	pull_data(skb, sizeof(*outer) + IPV6 + sizeof(struct tcp) < skb->len ? sizeof(*outer) + IPV6 + sizeof(struct tcp)
									     : skb->len);
	outer = (void *)(long)skb->data;
	if ((void *)(outer + 1) > (void *)(long)skb->data_end)
		return NEXT;
	/* A flag that is not known, a VNI that is none, or congestion that has to be told to the inside. */
	if (outer->vxlan.flags != be32(0x08000000) || (outer->vxlan.vni & be32(0xff)) || (outer->ip.tos & ECN) == ECN_CE)
		return NEXT;
	vni = be32(outer->vxlan.vni) >> 8;
	from = outer->ip.from;
	if (!read_packet(skb, ROOM, &packet, 0))
		return NEXT;
	packet.verdicts = verdicts_of(host);
	path = path_to(&packet.from);
	if (!path || path->kind == PATH_DIRECT || path->vtep != from || path->vni != vni)
		return NEXT;
	target = map_lookup(&pods, &packet.to);
	if (!target || !(target->flags & POD_FAST) || target->network != path->network)
		return NEXT;
	outer = (void *)(long)skb->data;
	if ((void *)(outer + 1) > (void *)(long)skb->data_end)
		return NEXT;
	switched = path->kind == PATH_SWITCHED;
	if (switched) {
		if (!same_mac(outer->inner.from, path->mac) || !same_mac(outer->inner.to, target->mac))
			return NEXT;
	} else if (!same_mac(outer->inner.to, path->mine)) {
		return NEXT;
	}
	if (!may_pass(skb, &packet, switched, target->mtu, epoch_of(host, target, 0), is_selected(target, 0)))
		return NEXT;
	/* The checksum that a device may have verified was the outer one. */
	flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_NO_CSUM_RESET;
	if (is_ipv6(&packet)) {
		/* Before Linux 6.3 the packet stays one of IPv4 in the kernel's eyes, until an interface receives it. */
		queued = adjust_room(skb, -ROOM, BPF_ADJ_ROOM_MAC, flags | ADJ_ROOM_DECAP_L3_IPV6) != 0;
	}
	if ((queued || !is_ipv6(&packet)) && adjust_room(skb, -ROOM, BPF_ADJ_ROOM_MAC, flags))
		return leave_known(skb, &packet, COUNT_NEXT_HOP);
	csum_level(skb, BPF_CSUM_LEVEL_DEC);
	count(COUNT_VXLAN_IN, skb->len);
	if (!switched && !forward(skb, &packet, 0))
		return SHOT;
	return deliver(skb, &packet, target, switched ? path->mac : target->gateway, queued);
}

SEC("classifier")
int from_underlay(struct __sk_buff *skb)
{
	struct host *host = this_host();
	struct packet packet = {};
	struct path *path;
	struct pod *target;

	if (!host || skb->pkt_type != FOR_THIS_HOST || skb->vlan_present || !read_packet(skb, 0, &packet, 1))
		return NEXT;
	if (packet.transport == PROTOCOL_UDP && packet.to_port == host->port && !is_ipv6(&packet) && host->vtep &&
	    packet.to.word[3] == host->vtep)
		return receive_vxlan(skb, host);
	packet.verdicts = verdicts_of(host);
	target = map_lookup(&pods, &packet.to);
	if (!target || !(target->flags & POD_FAST))
		return NEXT;
	path = path_to(&packet.from);
	if (!path || path->kind != PATH_DIRECT || path->network != target->network)
		return NEXT;
	if (!may_pass(skb, &packet, 0, target->mtu, epoch_of(host, target, 0), is_selected(target, 0)))
		return NEXT;
	if (!cut_padding(skb, &packet))
		return leave_known(skb, &packet, COUNT_NEXT_HOP);
	count(COUNT_DIRECT_IN, skb->len);
	if (!forward(skb, &packet, 0))
		return SHOT;
	return deliver(skb, &packet, target, target->gateway, 0);
}

/* Whether the fast path might send packets between these addresses: an endpoint of this host that it is for, and another
 * one or a block of another host. */
INLINE int is_between_endpoints(const struct packet *packet, const struct pod *from, const struct pod *to)
{
	if (from && !(from->flags & POD_FAST))
		return 0;
	if (to && !(to->flags & POD_FAST))
		return 0;
	if (from && to)
		return 1;
	if (from)
		return path_to(&packet->to) != 0;
	if (to)
		return path_to(&packet->from) != 0;
	return 0;
}

/* Remembers a flow of which the stack has let a packet through as it was. */
INLINE void remember(const struct packet *packet, const struct flow *key, int direction, struct memory *known, __u32 epoch,
		     int selected)
{
	struct memory new = { .epoch = epoch };

	if (selected) {
		if (is_for_tracking(packet))
			return;
		new.verdicts = packet->verdicts;
		new.seen[0] = direction ? 0 : ticks();
		new.seen[1] = direction ? ticks() : 0;
	}
	if (!known || known->epoch != epoch || (selected && known->verdicts != packet->verdicts)) {
		map_update(&flows, key, &new, BPF_ANY);
	} else if (selected) {
		if (direction)
			known->seen[1] = new.seen[1];
		else
			known->seen[0] = new.seen[0];
	}
}

SEC("classifier")
int from_stack(struct __sk_buff *skb)
{
	struct host *host = this_host();
	struct packet packet = {};
	struct flow key = {};
	struct pod *from, *to;
	struct memory *known, slow = { .epoch = FLOW_SLOW };
	int direction;

	if (skb->mark == REDIRECTED) {
		skb->mark = 0;
		return NEXT;
	}
	if (!host || skb->vlan_present || !read_packet(skb, 0, &packet, 1))
		return NEXT;
	packet.verdicts = verdicts_of(host);
	direction = flow_of(&packet, &key);
	known = map_lookup(&flows, &key);
	if (skb->hash != token_of(&packet)) {
		if (known ? known->epoch == FLOW_SLOW : packet.transport == PROTOCOL_TCP && !begins_connection(&packet))
			return NEXT;
		from = map_lookup(&pods, &packet.from);
		to = map_lookup(&pods, &packet.to);
		if (known || is_between_endpoints(&packet, from, to))
			map_update(&flows, &key, &slow, BPF_ANY);
		return NEXT;
	}
	from = map_lookup(&pods, &packet.from);
	to = map_lookup(&pods, &packet.to);
	if (!from) {
		LET_VERIFIER_SEE(to);
		if (!to)
			return NEXT;
	}
	remember(&packet, &key, direction, known, epoch_of(host, from, to), is_selected(from, to));
	return NEXT;
}
