/* SPDX-License-Identifier: MIT OR GPL-2.0 */
/* The maps of the fast path. daemon/fastpath/src/layout.rs has the same structures: a change of one of them, or of a
 * limit, is a new LAYOUT there. */
#ifndef OVL_MAPS_H
#define OVL_MAPS_H

#include "helpers.h"

/* An IPv6 address, or an IPv4 address as ::ffff:a.b.c.d, in network byte order. */
struct address {
	__u32 word[4];
};

/* What a local endpoint is. */
struct pod {
	__u32 ifindex; /* the host's interface of its veth pair */
	__u32 epoch;   /* differs between endpoints that have one address after another */
	__u64 network;
	__u8 mac[6];	 /* of the interface inside the namespace */
	__u8 gateway[6]; /* of the host's interface; not of a switched network */
	__u16 mtu;	 /* of both interfaces */
	__u16 flags;
};

/* The fast path is for this endpoint. Without it the entry only keeps longer prefixes from being looked up. */
#define POD_FAST 1
/* The host's interface has a queueing discipline, which packets to the endpoint must pass. */
#define POD_QUEUED 2
/* The endpoint is on a switched network: its host's interface is a port of a bridge, and frames keep their addresses. */
#define POD_SWITCHED 4
/* A network policy selects the endpoint: the stack judges its flows, and the programs remember what it has let through. */
#define POD_SELECTED 8

struct prefix {
	__u32 length; /* of the prefix; 96 more for IPv4 */
	struct address address;
};

/* How another host's block of a routed network is reached, or another host's endpoint of a switched one. */
struct path {
	__u64 network;
	__u32 kind;
	__u32 vtep; /* IPv4, in network byte order; not for PATH_DIRECT, as all below but the MTU */
	__u32 vni;
	__u16 port;   /* in network byte order */
	__u16 mtu;    /* of the packet inside */
	__u8 mac[6];  /* of the VXLAN device of the other host; for PATH_SWITCHED of the endpoint */
	__u8 mine[6]; /* of this host's VXLAN device; only for PATH_VXLAN */
	__u32 unused;
};

#define PATH_DIRECT 1
#define PATH_VXLAN 2
/* In VXLAN too, but the frame inside keeps its addresses. */
#define PATH_SWITCHED 3

/* This host. */
struct host {
	__u32 on;
	__u32 generation; /* part of what is remembered of flows: a new one is the end of all of them */
	__u32 underlay;	  /* the index of the device of the underlay */
	__u32 vtep;	  /* IPv4, in network byte order; 0: VXLAN is left to the kernel's devices */
	__u16 port;	  /* of VXLAN, in network byte order */
	__u16 unused;
	__u32 verdicts;	  /* increases after each change of policies: the stack judges flows of selected endpoints again */
};

/* The two ends of a flow, the smaller one first, so that both directions have one entry. */
struct flow {
	struct address a;
	struct address b;
	__u16 a_port;
	__u16 b_port;
	__u32 protocol;
};

/* What is remembered of a flow. */
struct memory {
	__u32 epoch;	/* of its ends, or FLOW_SLOW if the stack translates it */
	__u32 verdicts; /* of the host when the stack let a packet through; only if an end is selected */
	__u32 seen[2];	/* when that was, for each direction, in TICKs; only if an end is selected */
};

#define FLOW_SLOW 0

struct counter {
	__u64 packets;
	__u64 bytes;
};

enum count {
	COUNT_LOCAL,	   /* to an endpoint of this host */
	COUNT_DIRECT_OUT,  /* to another host, without VXLAN */
	COUNT_VXLAN_OUT,   /* to another host, in VXLAN */
	COUNT_DIRECT_IN,   /* from another host, without VXLAN */
	COUNT_VXLAN_IN,	   /* from another host, in VXLAN */
	COUNT_NEW_FLOW,	   /* left to the stack: not known yet whether it translates the flow */
	COUNT_TRANSLATED,  /* left to the stack: it translates the flow */
	COUNT_SOURCE,	   /* left to the stack: not the addresses of the endpoint */
	COUNT_TOO_BIG,	   /* left to the stack, which says so to the sender */
	COUNT_HOP_LIMIT,   /* left to the stack, which says so to the sender */
	COUNT_NEXT_HOP,	   /* left to the stack: the next hop is not known yet, or not by the underlay's device */
	COUNT_POLICY,	   /* left to the stack, which judges the flow of a selected endpoint, or has to see it again */
	COUNTS,
};

/* Maps as aya and libbpf read them from an object with BTF. */
#define UINT(name, value) int(*name)[value]
#define TYPE(name, type) type *name

struct {
	UINT(type, BPF_MAP_TYPE_ARRAY);
	TYPE(key, __u32);
	TYPE(value, struct host);
	UINT(max_entries, 1);
} host SEC(".maps");

struct {
	UINT(type, BPF_MAP_TYPE_HASH);
	TYPE(key, struct address);
	TYPE(value, struct pod);
	UINT(max_entries, 65536);
	UINT(map_flags, BPF_F_NO_PREALLOC);
} pods SEC(".maps");

struct {
	UINT(type, BPF_MAP_TYPE_LPM_TRIE);
	TYPE(key, struct prefix);
	TYPE(value, struct path);
	UINT(max_entries, 262144);
	UINT(map_flags, BPF_F_NO_PREALLOC);
} paths SEC(".maps");

struct {
	UINT(type, BPF_MAP_TYPE_LRU_HASH);
	TYPE(key, struct flow);
	TYPE(value, struct memory);
	UINT(max_entries, 65536);
} flows SEC(".maps");

struct {
	UINT(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	TYPE(key, __u32);
	TYPE(value, struct counter);
	UINT(max_entries, COUNTS);
} counters SEC(".maps");

/* By the index of the host's interface: what went to the endpoint past that interface's own counters. */
struct {
	UINT(type, BPF_MAP_TYPE_PERCPU_HASH);
	TYPE(key, __u32);
	TYPE(value, struct counter);
	UINT(max_entries, 65536);
	UINT(map_flags, BPF_F_NO_PREALLOC);
} delivered SEC(".maps");

#endif
