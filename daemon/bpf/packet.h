/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* What the programs read of a packet: TCP and UDP over IPv4 and IPv6, without options, extension headers and fragments. */
#ifndef OVL_PACKET_H
#define OVL_PACKET_H

#include "maps.h"

#define ETHERNET 14
#define IPV4 20
#define IPV6 40

struct ethernet {
	__u8 to[6];
	__u8 from[6];
	__u16 protocol;
} __attribute__((packed));

struct ipv4 {
	__u8 version_length;
	__u8 tos;
	__u16 length;
	__u16 id;
	__u16 fragment;
	__u8 ttl;
	__u8 protocol;
	__u16 check;
	__u32 from;
	__u32 to;
} __attribute__((packed));

struct ipv6 {
	__u8 version_class;
	__u8 class_label;
	__u16 label;
	__u16 length;
	__u8 next;
	__u8 hop_limit;
	__u32 from[4];
	__u32 to[4];
} __attribute__((packed));

struct udp {
	__u16 from;
	__u16 to;
	__u16 length;
	__u16 check;
} __attribute__((packed));

/* The first bytes of a TCP header. */
struct tcp {
	__u16 from;
	__u16 to;
	__u32 sequence;
	__u32 acknowledged;
	__u8 offset;
	__u8 flags;
} __attribute__((packed));

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct vxlan {
	__u32 flags;
	__u32 vni;
} __attribute__((packed));

struct packet {
	struct address from;
	struct address to;
	__u16 from_port;
	__u16 to_port;
	__u16 protocol; /* of Ethernet, in network byte order */
	__u8 transport;
	__u8 tcp_flags;
	__u8 ttl;
	__u8 tos;
	__u32 headers; /* the length of the headers of IP and of the transport */
	__u32 length;  /* from the header of IP on */
	__u32 verdicts; /* of the host when a program first saw the packet */
};

INLINE int is_ipv6(const struct packet *packet)
{
	return packet->protocol == be16(ETH_P_IPV6);
}

INLINE void map_ipv4(struct address *address, __u32 ipv4)
{
	address->word[0] = 0;
	address->word[1] = 0;
	address->word[2] = be32(0xffff);
	address->word[3] = ipv4;
}

INLINE int same_mac(const __u8 *a, const __u8 *b)
{
	return ((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]) | (a[5] ^ b[5])) == 0;
}

INLINE void copy_mac(__u8 *to, const __u8 *from)
{
	for (int i = 0; i < 6; i++)
		to[i] = from[i];
}

/* The sum of the words of a header, folded once. */
INLINE __u32 sum_of(const struct ipv4 *ip)
{
	const __u16 *words = (const void *)ip;
	__u32 sum = 0;

	for (int i = 0; i < 10; i++)
		sum += words[i];
	return (sum & 0xffff) + (sum >> 16);
}

INLINE int is_checksum_right(const struct ipv4 *ip)
{
	return sum_of(ip) == 0xffff;
}

/* The length of the shortest Ethernet frame, without its checksum: shorter ones are padded. */
#define SHORTEST_FRAME 60

/* Whether the packet has the length that its header says. The stack drops what is too short, and cuts off what follows.
 * `padded`: it may have the padding of a short frame. */
INLINE int is_length_right(struct __sk_buff *skb, __u32 at, const struct packet *packet, int padded)
{
	__u32 there = skb->len - at - ETHERNET;

	/* The kernel made it, and its header may have no length (BIG TCP). */
	if (skb->gso_size)
		return 1;
	if (packet->length < packet->headers || packet->length > there)
		return 0;
	return packet->length == there || (padded && skb->len <= SHORTEST_FRAME);
}

/* Reads the packet whose Ethernet header is at `at`. False if it is not one that the fast path knows. */
INLINE int read_packet(struct __sk_buff *skb, __u32 at, struct packet *packet, int padded)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	struct ethernet *ethernet = data + at;
	void *transport;

	if ((void *)(ethernet + 1) > end)
		return 0;
	packet->protocol = ethernet->protocol;
	if (ethernet->protocol == be16(ETH_P_IP)) {
		struct ipv4 *ip = (void *)(ethernet + 1);

		if ((void *)(ip + 1) > end || ip->version_length != 0x45 || !is_checksum_right(ip))
			return 0;
		/* More fragments follow, or this one is not the first. */
		if (ip->fragment & be16(0x3fff))
			return 0;
		map_ipv4(&packet->from, ip->from);
		map_ipv4(&packet->to, ip->to);
		packet->transport = ip->protocol;
		packet->ttl = ip->ttl;
		packet->tos = ip->tos;
		packet->length = be16(ip->length);
		packet->headers = IPV4;
		transport = ip + 1;
	} else if (ethernet->protocol == be16(ETH_P_IPV6)) {
		struct ipv6 *ip = (void *)(ethernet + 1);

		if ((void *)(ip + 1) > end || (ip->version_class >> 4) != 6)
			return 0;
		for (int i = 0; i < 4; i++) {
			packet->from.word[i] = ip->from[i];
			packet->to.word[i] = ip->to[i];
		}
		packet->transport = ip->next;
		packet->ttl = ip->hop_limit;
		packet->tos = (ip->version_class << 4) | (ip->class_label >> 4);
		packet->length = be16(ip->length) + IPV6;
		packet->headers = IPV6;
		transport = ip + 1;
	} else {
		return 0;
	}
	if (packet->transport == PROTOCOL_TCP) {
		struct tcp *tcp = transport;

		if ((void *)(tcp + 1) > end)
			return 0;
		packet->from_port = tcp->from;
		packet->to_port = tcp->to;
		packet->tcp_flags = tcp->flags;
		packet->headers += (tcp->offset >> 4) * 4;
	} else if (packet->transport == PROTOCOL_UDP) {
		struct udp *udp = transport;

		if ((void *)(udp + 1) > end)
			return 0;
		packet->from_port = udp->from;
		packet->to_port = udp->to;
		packet->tcp_flags = 0;
		packet->headers += sizeof(*udp);
	} else {
		return 0;
	}
	return is_length_right(skb, at, packet, padded);
}

/* The length of the longest IP packet that this becomes on a wire: GSO packets are cut into segments. */
INLINE __u32 wire_length(struct __sk_buff *skb, const struct packet *packet)
{
	return skb->gso_size ? packet->headers + skb->gso_size : packet->length;
}

/* Cuts the padding of a short frame off. */
INLINE int cut_padding(struct __sk_buff *skb, const struct packet *packet)
{
	if (skb->gso_size || skb->len == ETHERNET + packet->length)
		return 1;
	return change_tail(skb, ETHERNET + packet->length, 0) == 0;
}

/* Decrements the TTL or hop limit, as a router does. False if the packet is not what it was. */
INLINE int forward(struct __sk_buff *skb, const struct packet *packet, __u32 at)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;

	if (is_ipv6(packet)) {
		struct ipv6 *ip = data + at + ETHERNET;

		if ((void *)(ip + 1) > end)
			return 0;
		ip->hop_limit--;
	} else {
		struct ipv4 *ip = data + at + ETHERNET;
		__u32 check;

		if ((void *)(ip + 1) > end)
			return 0;
		/* RFC 1624: the checksum of the word with the TTL in its upper half. */
		check = ip->check + be16(0x0100);
		ip->check = check + (check >= 0xffff);
		ip->ttl--;
	}
	return 1;
}

/* Writes the addresses and the protocol of the Ethernet header in front. */
INLINE int write_ethernet(struct __sk_buff *skb, const __u8 *to, const __u8 *from, __u16 protocol)
{
	struct ethernet *ethernet = (void *)(long)skb->data;

	if ((void *)(ethernet + 1) > (void *)(long)skb->data_end)
		return 0;
	copy_mac(ethernet->to, to);
	copy_mac(ethernet->from, from);
	ethernet->protocol = protocol;
	return 1;
}

#endif
